//! Prints the accuracy of predictions on a file of measured runs: `accuracy RUNS.csv [--set NAME=VALUE] [--fit N | --cross N] [--csv OUT]
//! [--svg OUT]`.

use paceline_planner::validate::{Split, cross_validate, fit, load, scatter, validate};
use paceline_sim::cluster::{PARAMETERS, Physics};
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let file = arguments
        .first()
        .ok_or("usage: accuracy RUNS.csv [--set NAME=VALUE] [--fit N | --cross N] [--csv OUT] [--svg OUT]")?;
    let option = |name: &str| arguments.iter().position(|a| a == name).and_then(|n| arguments.get(n + 1));
    let cases = load(&std::fs::read_to_string(file)?)?;
    let mut physics = Physics::default();
    if let Some((name, value)) = option("--set").and_then(|text| text.split_once('=')) {
        let parameter = PARAMETERS.iter().find(|p| p.name == name).ok_or("no such parameter")?;
        (parameter.set)(&mut physics, value.parse()?);
    }
    if let Some(evaluations) = option("--fit") {
        let found = fit(cases.cases.iter(), &Physics::EXPECTED, evaluations.parse()?)?;
        println!("loss {:.4} -> {:.4} on {} runs", found.before, found.after, found.runs);
        physics = found.physics;
        for parameter in PARAMETERS {
            println!("{} = {:.5e}  # {}", parameter.name, (parameter.get)(&physics), parameter.meaning);
        }
    }
    if let Some(evaluations) = option("--cross") {
        for left in cross_validate(&cases.cases, Split::Source, &Physics::EXPECTED, evaluations.parse()?)? {
            println!(
                "{}: time {:?} memory {:?} oom {:?}",
                left.source, left.time_median_error, left.memory_median_error, left.oom_right
            );
        }
        return Ok(());
    }
    let validation = validate(cases, &physics);
    print!("{}", validation.to_markdown());
    for source in &validation.sources {
        for (reason, count) in &source.skipped {
            println!("{}: {count} x {reason}", source.source);
        }
    }
    if let Some(out) = option("--csv") {
        std::fs::write(out, validation.to_csv())?;
    }
    if let Some(out) = option("--svg") {
        std::fs::write(out, scatter(&validation.rows))?;
    }
    Ok(())
}
