//! The suite for bare GPU machines, where there is no GPU: its arguments, its errors, and its result file, which several calls fill together.

use std::path::Path;
use std::process::{Command, Output};

fn suite(folder: &Path, words: &[&str]) -> Option<Output> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/gpu-suite");
    // A machine without Python cannot run the suite, and has nothing to check here.
    Command::new("python3").arg(script).args(words).current_dir(folder).env("HOME", folder).output().ok()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn parts_are_run_one_by_one_and_their_results_put_together() {
    let folder = tempfile::tempdir().unwrap();
    let binaries = Path::new(env!("CARGO_BIN_EXE_paceline")).parent().unwrap().display().to_string();
    let run = |part: &str| {
        let words = ["run", "--dry-run", "--bin", &binaries, "--output", "results.json", "--part", part];
        suite(folder.path(), &words)
    };
    let Some(first) = run("processes") else { return };
    assert!(first.status.success(), "{}{}", text(&first.stdout), text(&first.stderr));
    let second = run("loop").unwrap();
    assert!(second.status.success(), "{}{}", text(&second.stdout), text(&second.stderr));
    let said = text(&second.stdout);
    assert!(said.starts_with("dry run: emulated GPU") && said.contains("tcp with 2 ranks"), "{said}");
    let results: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("results.json")).unwrap()).unwrap();
    assert_eq!(results["format"], "paceline.gpu-suite/2");
    for part in ["processes", "loop"] {
        assert_eq!(results["parts"][part]["state"], "ok", "{results}");
    }
    assert!(results["parts"]["loop"]["figures"][0]["peak_bytes_equal"].as_bool().unwrap(), "{results}");
}

#[test]
fn what_fails_is_in_the_table_and_in_the_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["run", "--dry-run", "--bin", ".", "--part", "training"];
    let Some(output) = suite(folder.path(), &words) else { return };
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stdout);
    assert!(said.contains("FAILED") && said.contains("gpu-suite bundle FOLDER"), "{said}");
    let unknown = suite(folder.path(), &["run", "--part", "nonsense"]).unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("pytorch"), "the parts are listed");
    let listed = suite(folder.path(), &["list"]).unwrap();
    assert_eq!(text(&listed.stdout).lines().count(), 11);
}
