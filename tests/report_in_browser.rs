//! The HTML report in a real browser, without a screen: it renders, says nothing on the console, asks for nothing from anywhere, and
//! shows the figures of the JSON. Without a Chromium of whatever name the test says so and passes; what can be checked without one is
//! checked in `tui/tests/views/report.rs`.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Names that Chromium goes by; CHROME names another.
const BROWSERS: [&str; 6] =
    ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"];

/// Looks at the page as a reader would, and leaves what it saw in the page. The first script runs before anything else.
const FIRST: &str = "<script>var seen = { errors: [] };\
    addEventListener('error', e => seen.errors.push(String(e.message || e.target.outerHTML)), true);\
    for (const kind of ['error', 'warn', 'log']) console[kind] = (...said) => seen.errors.push(said.join(' '));</script>";
const LAST: &str = r#"<script>addEventListener('load', () => {
    const number = element => Number(element.dataset.value);
    const shown = element => { const box = element.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
    const all = selector => [...document.querySelectorAll(selector)];
    seen.iteration = number(document.querySelector('#iteration'));
    seen.speed = number(document.querySelector('#speed'));
    seen.peaks = all('#memory td[data-value]').map(number);
    seen.time = all('#time td[data-value]').map(number);
    seen.plans = all('#plans td[data-value]').map(number);
    seen.embedded = document.querySelector('#prediction').textContent;
    JSON.parse(seen.embedded);
    seen.drawings = all('svg').length;
    seen.hidden = all('svg, h1, h2, table, #timeline svg rect[width]').filter(e => !shown(e)).map(e => e.outerHTML.slice(0, 99));
    seen.passes = all('#timeline svg rect title').length;
    seen.wide = document.documentElement.scrollWidth - innerWidth;
    seen.fetched = performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:'));
    seen.text = document.body.innerText.length;
    const note = document.createElement('pre');
    note.id = 'seen';
    note.textContent = JSON.stringify(seen);
    document.body.append(note);
});</script>"#;

fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("CHROME").map(PathBuf::from);
    let works =
        |path: &PathBuf| Command::new(path).arg("--version").output().is_ok_and(|output| output.status.success());
    named.into_iter().chain(BROWSERS.map(PathBuf::from)).find(works)
}

fn browse(browser: &Path, folder: &Path, page: &Path, more: &[&str]) -> Output {
    let profile = format!("--user-data-dir={}", folder.join("profile").display());
    let usual =
        ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"];
    let url = format!("file://{}", page.canonicalize().unwrap().display());
    Command::new(browser).args(usual).arg(profile).args(more).arg(url).output().unwrap()
}

/// Writes the report of a job, looks at it, and returns what was seen beside the document of `--json`.
fn look(browser: &Path, folder: &Path, name: &str, job: &str, more: &[&str]) -> (Value, Value) {
    let job_file = folder.join(format!("{name}.toml"));
    fs::write(&job_file, job).unwrap();
    let page = folder.join(format!("{name}.html"));
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/profiles/data/cpu.csv");
    let output = Command::new(env!("CARGO_BIN_EXE_paceline"))
        .args(["report", "--json", "--profile", shipped, "-o"])
        .arg(&page)
        .arg(&job_file)
        .args(more)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();

    // As it is: nothing on the console, and a picture that is not blank.
    let picture = folder.join(format!("{name}.png"));
    let shot = format!("--screenshot={}", picture.display());
    let plain = browse(browser, folder, &page, &[&shot, "--window-size=1280,1400"]);
    let said = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert!(!said.contains("CONSOLE"), "{said}");
    let bytes = fs::metadata(&picture).unwrap_or_else(|_| panic!("no picture: {said}")).len();
    assert!(bytes > 20_000, "a picture of {bytes} bytes is blank");

    // With the looks of a reader.
    let text = fs::read_to_string(&page).unwrap();
    let watched =
        text.replacen("<head>", &format!("<head>{FIRST}"), 1).replacen("</body>", &format!("{LAST}</body>"), 1);
    assert_eq!(watched.len(), text.len() + FIRST.len() + LAST.len());
    let watched_page = folder.join(format!("{name}-watched.html"));
    fs::write(&watched_page, watched).unwrap();
    let dumped = browse(browser, folder, &watched_page, &["--dump-dom", "--window-size=1280,1400"]);
    let dom = String::from_utf8_lossy(&dumped.stdout).into_owned();
    let note = dom.split_once("<pre id=\"seen\">").unwrap_or_else(|| panic!("the page was not looked at: {dom}")).1;
    let note = note.split("</pre>").next().unwrap();
    let note = note.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    (serde_json::from_str(&note).unwrap(), document["prediction"].clone())
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

#[test]
fn a_report_renders_with_the_figures_of_the_json() {
    let Some(browser) = browser() else {
        eprintln!("skipped: no Chromium is installed (CHROME may name one)");
        return;
    };
    let folder = std::env::temp_dir().join(format!("paceline-browser-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let jobs = [
        ("local", "model = 'demo-1m'\nseq = 64\nglobal_batch = 8\npp = 2\nschedule = 'zb-h1'\n"),
        (
            "cluster",
            "model = 'llama-3-8b'\ncluster = 'dgx-h100-ib'\nnodes = 2\nseq = 4096\nglobal_batch = 64\ntp = 2\npp = 4\n",
        ),
    ];
    for (name, job) in jobs {
        let (seen, prediction) = look(&browser, &folder, name, job, &["--top", "5"]);
        for empty in ["errors", "hidden", "fetched"] {
            assert_eq!(seen[empty], Value::Array(vec![]), "{name}: {empty}");
        }
        let embedded: Value = serde_json::from_str(seen["embedded"].as_str().unwrap()).unwrap();
        assert_eq!(embedded, prediction, "{name}");
        assert_eq!(seen["iteration"], prediction["iteration_seconds"], "{name}");
        assert_eq!(seen["speed"], prediction["tokens_per_second_per_gpu"], "{name}");
        assert_eq!(numbers(&seen["peaks"]), numbers(&prediction["memory"]["peak_bytes"]), "{name}");
        let mut parts: Vec<f64> = prediction["time"].as_object().unwrap().values().filter_map(Value::as_f64).collect();
        parts.retain(|seconds| *seconds > 0.0);
        let mut shown = numbers(&seen["time"]);
        parts.sort_by(f64::total_cmp);
        shown.sort_by(f64::total_cmp);
        assert_eq!(shown, parts, "{name}");
        // The best plan first, and a bar for time, one for each rank and the timeline.
        let plans = numbers(&seen["plans"]);
        assert!(plans.len() == 5 && plans.is_sorted(), "{name}: {plans:?}");
        assert_eq!(seen["drawings"].as_u64().unwrap() as usize, numbers(&seen["peaks"]).len() + 2, "{name}");
        assert!(seen["passes"].as_u64().unwrap() > 20 && seen["text"].as_u64().unwrap() > 500, "{name}: {seen}");
        assert!(seen["wide"].as_i64().unwrap() <= 0, "{name} needs no scrolling sideways: {}", seen["wide"]);
    }
    fs::remove_dir_all(&folder).unwrap();
}
