//! Plan files: written, read, damaged.

use super::*;
use crate::configuration::Configuration;
use crate::prediction::predict;
use paceline_sim::cost::FixedTimes;
use paceline_sim::units::Nanos;
use proptest::prelude::*;

fn plan() -> Plan {
    let text =
        "model = 'demo-1m'\nseq = 16\nglobal_batch = 8\ndp = 2\npp = 2\nrecompute = 'full'\n[train]\nlr = 1e-3\n";
    let job = Job::from_table(text.parse().unwrap(), "job").unwrap();
    let machine = Machine { devices: 2, flops_per_second: None };
    let mut configuration = Configuration::of_job(&job).unwrap();
    configuration.stage_layers = vec![4, 6];
    let program = configuration.program(&job, machine).unwrap();
    let costs = FixedTimes::uniform(Nanos(10), Nanos(11), Nanos(9), Nanos(1));
    let (prediction, _) = predict(&program, &costs, machine, None).unwrap();
    Plan { job, configuration, machine, prediction }
}

fn read(text: &str) -> Result<Plan, PlanError> {
    Plan::from_json(text, Path::new("plan.json"))
}

#[test]
fn a_plan_is_read_as_it_was_written_and_lowers_to_the_same_program() {
    let plan = plan();
    let folder = std::env::temp_dir().join(format!("paceline-plan-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join("plan.json");
    plan.write(&path).unwrap();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
    let found = Plan::read(&path).unwrap();
    assert_eq!(found, plan);
    assert_eq!(found.program().unwrap(), plan.program().unwrap());
    assert_eq!(found.program().unwrap().stages[0].units.len(), 4);
    fs::remove_dir_all(&folder).unwrap();
    assert!(matches!(Plan::read(&path), Err(PlanError::File { .. })));
}

#[test]
fn damaged_and_foreign_plans_are_refused_with_the_reason() {
    let text = plan().to_json().unwrap();
    let change = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        read(&text.replacen(from, to, 1)).unwrap_err()
    };
    let newer = change("paceline.plan/1", "paceline.plan/2");
    assert!(matches!(newer, PlanError::Format { newer: true, .. }));
    assert!(newer.to_string().contains("update paceline"), "{newer}");
    assert!(matches!(change("paceline.plan/1", "paceline.trace/1"), PlanError::Format { newer: false, .. }));
    let digest = model_digest(&plan().job.model);
    let other = change(&digest, "0123456789abcdef");
    assert!(other.to_string().contains("0123456789abcdef") && other.to_string().contains(&digest), "{other}");
    // The other way round: the plan stays, the model changes.
    assert!(matches!(change("\"demo-1m\"", "\"demo-3m\""), PlanError::OtherModel { .. }));
    assert!(matches!(change("\"demo-1m\"", "\"demo-0m\""), PlanError::Job { .. }));
    assert!(change("\"schedule\": \"1f1b\"", "\"schedule\": \"2f2b\"").to_string().contains("2f2b"));
    assert!(change("\"dp\": 2,\n    \"pp\"", "\"dp\": 3,\n    \"pp\"").to_string().contains("global_batch = 8"));
    assert!(matches!(change("\"machine\"", "\"engine\""), PlanError::Content { .. }));
    let layers = "\"stage_layers\": [\n      4,\n      6";
    assert!(change(layers, "\"stage_layers\": [\n      4,\n      5").to_string().contains("sum to 10"));
    assert!(matches!(read(""), Err(PlanError::Truncated { .. })));
    assert!(matches!(read("[1, 2]"), Err(PlanError::Format { .. })));
    assert!(matches!(read("hello"), Err(PlanError::Content { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_truncated_plan_is_refused(share in 0.0..1.0f64) {
        let text = plan().to_json().unwrap();
        let mut end = (text.len() as f64 * share) as usize;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        prop_assert!(matches!(read(&text[..end]), Err(PlanError::Truncated { .. })), "cut at {end}");
    }

    /// Whatever happens to a few characters, the reader ends with a plan or an error.
    #[test]
    fn a_changed_plan_is_a_plan_or_an_error(changes in proptest::collection::vec((any::<prop::sample::Index>(), "[0-9a-z\\[\\]{}\",:. -]"), 1..4)) {
        let mut bytes = plan().to_json().unwrap().into_bytes();
        for (place, character) in changes {
            let at = place.index(bytes.len());
            bytes[at] = character.as_bytes()[0];
        }
        if let Err(error) = read(&String::from_utf8(bytes).unwrap()) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
