//! The suite for bare GPU machines, where there is no GPU: a bundle of what was built, every part on the emulated GPU, the result file that
//! several calls fill together, and errors.

use std::path::Path;
use std::process::{Command, Output};

const PARTS: [&str; 11] = [
    "kernels",
    "training",
    "gradients",
    "curve",
    "schedules",
    "states",
    "processes",
    "rates",
    "loop",
    "model",
    "pytorch",
];

/// `None` where there is no Python: such a machine cannot run the suite, and has nothing to check here.
fn suite(script: &Path, folder: &Path, words: &[&str]) -> Option<Output> {
    // The home is empty: nothing that lies about on this machine is used.
    Command::new("python3").arg(script).args(words).current_dir(folder).env("HOME", folder).output().ok()
}

fn source() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/gpu-suite"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_bundle_runs_every_part_on_the_emulated_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = folder.path().join("bundle");
    let built = Path::new(env!("CARGO_BIN_EXE_paceline")).parent().unwrap();
    let words = ["bundle", &bundle.display().to_string(), "--built", &built.display().to_string()];
    let Some(made) = suite(source(), folder.path(), &words) else { return };
    assert!(made.status.success(), "{}{}", text(&made.stdout), text(&made.stderr));
    // The emulator, where another test has compiled it already.
    let cache = folder.path().join(".cache/paceline/kernels");
    std::fs::create_dir_all(&cache).unwrap();
    for file in std::fs::read_dir(env!("CARGO_TARGET_TMPDIR")).unwrap().flatten() {
        if file.file_name().to_string_lossy().starts_with("emulated-") && file.path().is_file() {
            std::fs::copy(file.path(), cache.join(file.file_name())).unwrap();
        }
    }
    let script = bundle.join("gpu-suite");
    let run = |words: &[&str]| {
        let output = suite(&script, folder.path(), &[&["run", "--dry-run"], words].concat()).unwrap();
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
        let results = std::fs::read(folder.path().join("gpu-suite.json")).unwrap();
        (text(&output.stdout), serde_json::from_slice::<serde_json::Value>(&results).unwrap())
    };
    let (_, first) = run(&["--part", "processes"]);
    assert_eq!(first["parts"].as_object().unwrap().len(), 1, "{first}");
    // The rest, into the same file.
    let rest: Vec<&str> =
        PARTS.iter().filter(|part| **part != "processes").flat_map(|part| ["--part", *part]).collect();
    let (said, results) = run(&rest);
    assert_eq!((&results["format"], said.lines().count()), (&"paceline.gpu-suite/2".into(), 12), "{said}");
    assert!(said.starts_with("dry run: emulated GPU") && said.contains("tcp with 2 ranks"), "{said}");
    for part in PARTS {
        let (row, figures) = (&results["parts"][part], &results["parts"][part]["figures"]);
        if part == "pytorch" && row["state"] == "skipped" {
            assert_eq!(row["said"], "this Python has no torch");
            continue;
        }
        assert_eq!(row["state"], "ok", "{row}");
        let number = |name: &str| figures[name].as_f64().unwrap_or_else(|| panic!("{part} has no {name}: {figures}"));
        match part {
            "kernels" => assert!(number("passed") >= 5.0),
            "gradients" => {
                assert_eq!(number("passed"), 1.0);
                assert!(figures["figures"][1]["worst_gradient_error"].as_f64().unwrap() > 0.0, "{figures}");
            }
            "training" => assert!(number("worst_difference") < 1e-4 && number("tokens_per_second") > 0.0),
            "curve" => assert_eq!(figures["gpu"].as_array().unwrap().len(), 2),
            "rates" => assert!(figures["flops_per_second"]["matmul f32"].as_f64().unwrap() > 0.0, "{figures}"),
            "loop" => assert!(figures[0]["peak_bytes_equal"].as_bool().unwrap(), "{figures}"),
            "model" => {
                assert!(number("tokens_per_second") > 0.0);
                assert!(figures["measured_peak_bytes"][0].as_u64().unwrap() > 0, "{figures}");
            }
            "pytorch" => assert!(number("ratio") > 0.0),
            _ => assert!(!figures.as_array().unwrap().is_empty(), "{part}: {figures}"),
        }
    }
    let profile = std::fs::read_to_string(folder.path().join("gpu-suite-profile.csv")).unwrap();
    assert!(profile.contains("emulated GPU"), "the profile is kept beside the results");
}

#[test]
fn what_fails_is_in_the_table_and_in_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["run", "--dry-run", "--bin", ".", "--part", "training"];
    let Some(output) = suite(source(), folder.path(), &words) else { return };
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stdout);
    assert!(said.contains("FAILED") && said.contains("gpu-suite bundle FOLDER"), "{said}");
    let unknown = suite(source(), folder.path(), &["run", "--part", "nonsense"]).unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("pytorch"), "the parts are listed");
    let listed = suite(source(), folder.path(), &["list"]).unwrap();
    let listed: Vec<String> =
        text(&listed.stdout).lines().filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect();
    assert_eq!(listed, PARTS);
}
