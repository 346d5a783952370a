//! The report: one file, well-formed, with the figures of the prediction.

use crate::stage::{answer, lanes, machine};
use paceline_planner::export::Target;
use paceline_tui::files::{export_plan, plan_file, write_plan};
use paceline_tui::report::{Accuracy, Report, html, perfetto, timeline_svg};
use paceline_tui::search::find;
use paceline_tui::settings::Settings;

fn report() -> Report {
    let job: toml::Table = "model = 'demo-1m'\nseq = 64\nglobal_batch = 4".parse().unwrap();
    let found = find(&job, &machine(), 3, &|_| true).unwrap();
    let mut answer = answer(4, 1.6);
    answer.title = "a <b> & \"c\" \u{1b}[31m model".into();
    Report {
        json: serde_json::json!({ "iteration_seconds": answer.figures.iteration_seconds, "note": "</script>" }),
        answer,
        configuration: "dp 1 pp 4".into(),
        job,
        lanes: lanes("1f1b", 4, 8),
        measured: Some(lanes("gpipe", 4, 8)),
        found: Some(found),
        accuracy: vec![Accuracy { what: "matmul".into(), count: 7, median: Some(0.031), worst: None }],
        accuracy_note: "made up".into(),
    }
}

/// Checks that every element that is opened is closed, in order.
fn assert_balanced(page: &str) {
    let mut open: Vec<&str> = Vec::new();
    for tag in page.split('<').skip(1) {
        let inside = &tag[..tag.find('>').expect("every < belongs to a tag")];
        let name = inside.trim_start_matches('/').split([' ', '/']).next().unwrap();
        if inside.starts_with('!') || inside.ends_with('/') || ["meta", "link"].contains(&name) {
            continue;
        }
        if inside.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "{inside}");
        } else {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn a_report_is_one_well_formed_file_with_the_figures() {
    let report = report();
    let page = html(&report);
    assert_balanced(&page);
    for source in ["http://", "https://", "src=", "@import"] {
        let found = page.replace("http://www.w3.org/2000/svg", "").contains(source);
        assert!(!found, "the file needs nothing else, but has {source}");
    }
    assert!(!page.contains('\u{1b}') && page.contains("a &lt;b&gt; &amp; &quot;c&quot;"));
    let seconds = report.answer.figures.iteration_seconds;
    assert!(page.contains(&format!("id=\"iteration\" data-value=\"{seconds}\"")));
    assert!(page.contains("does not fit") && page.contains("3.1 %"));
    let found = report.found.as_ref().unwrap();
    assert!(!found.rows.is_empty());
    assert!(page.contains(&format!("data-value=\"{}\"", found.rows[0].figures.iteration_seconds)));
    // The document for machines comes back as it was put in.
    let from = page.find("id=\"prediction\">").unwrap() + "id=\"prediction\">".len();
    let json = &page[from..from + page[from..].find("</script>").unwrap()];
    assert_eq!(serde_json::from_str::<serde_json::Value>(json).unwrap(), report.json);
}

#[test]
fn the_timeline_is_a_drawing_and_a_trace() {
    let lanes = lanes("zb-h1", 2, 4);
    let svg = timeline_svg(&lanes);
    assert_balanced(&svg);
    // Three passes for each of four microbatches on two ranks, each with what it is.
    assert_eq!(svg.matches("<title>forward of").count() + svg.matches("<title>backward for").count(), 24);
    let trace = perfetto(&lanes);
    let events = trace["traceEvents"].as_array().unwrap();
    let passes: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
    assert_eq!(passes.len(), 24 + 4);
    assert_eq!(passes[0]["dur"], 1e6);
}

#[test]
fn plans_are_found_and_written_as_files_that_are_read_again() {
    let machine = machine();
    let job: toml::Table = "model = 'demo-1m'\nseq = 64\nglobal_batch = 4".parse().unwrap();
    let found = find(&job, &machine, 3, &|_| true).unwrap();
    let text = plan_file(&found.rows[0], &machine).unwrap();
    let path = std::env::temp_dir().join(format!("paceline-plan-{}.json", std::process::id()));
    std::fs::write(&path, text).unwrap();
    let plan = paceline_planner::plan::Plan::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(plan.configuration.to_string(), found.rows[0].configuration);

    let cluster = Settings::usual().table();
    let found = find(&cluster, &machine, 3, &|_| true).unwrap();
    assert!(found.rows.windows(2).all(|w| w[0].figures.iteration_seconds <= w[1].figures.iteration_seconds));
    let best = &found.rows[0];
    // The plan, opened again, is predicted the same.
    let again: toml::Table = plan_file(best, &machine).unwrap().parse().unwrap();
    let answer = paceline_tui::question::ask(&Settings::from_table(&again), &machine).unwrap();
    assert_eq!(answer.figures, best.figures);
    assert!(found.candidates >= found.simulated && found.gap.is_some_and(|gap| gap > 0.0));
    // For another launcher: a folder of its own each time, and what it cannot do is said.
    let folder = std::env::temp_dir().join(format!("paceline-export-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut plain = best.clone();
    for (key, value) in [("schedule", "1f1b"), ("states", "zero1"), ("recompute", "none")] {
        plain.job.insert(key.into(), value.into());
    }
    plain.job.remove("chunks");
    for name in ["megatron", "megatron-2"] {
        let said = export_plan(&plain, &machine, Target::Megatron, &folder).unwrap();
        assert_eq!(said.split(';').next(), Some(name));
        let files = std::fs::read_dir(folder.join(name)).unwrap();
        let texts: Vec<String> = files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect();
        assert!(texts.iter().any(|text| text.contains("--tensor-model-parallel-size")), "{texts:?}");
    }
    plain.job.insert("schedule".into(), "zb-h1".into());
    let error = export_plan(&plain, &machine, Target::Megatron, &folder).unwrap_err();
    assert!(error.contains("zb-h1") && error.contains("interleaved"), "{error}");
    assert_eq!(write_plan(&plain, &machine, &folder).unwrap(), "plan.toml");
    assert_eq!(write_plan(&plain, &machine, &folder).unwrap(), "plan-2.toml");
    std::fs::remove_dir_all(&folder).unwrap();
    let stopped = find(&cluster, &machine, 3, &|at| at.decided < 2).unwrap();
    assert!(stopped.simulated < found.simulated);
    assert!(find(&"cluster = 'moon'\nmodel = 'x'".parse().unwrap(), &machine, 1, &|_| true).is_err());
}
