//! `paceline validate`: predictions against measured runs, source by source.

use crate::commands::import::open;
use crate::failure::Failure;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent};
use crate::trace_file::write_whole;
use paceline_planner::validate::{SourceScore, Split, Validation, cross_validate, fit, load, scatter, validate};
use paceline_sim::cluster::{PARAMETERS, Physics};
use std::path::PathBuf;

/// Predicts every measured run of a CSV file and scores the predictions: time, peak memory, out-of-memory verdicts, ranking.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline validate runs.csv\n  paceline validate runs.csv --csv predicted.csv --svg scatter.svg\n  paceline validate runs.csv --cluster fitted.toml\n  paceline validate runs.csv --rows --json\n  paceline validate runs.csv --cross --by gpu"
)]
pub struct Arguments {
    /// Measured runs: one row each, with at least the columns that an error would name.
    #[arg(value_name = "FILE.csv")]
    file: PathBuf,

    /// Take all runs to be of this cluster, and its fitted parameters: a preset, or a file that `paceline calibrate --from` wrote.
    /// By default each row's own words name its cluster.
    #[arg(long, value_name = "PRESET|FILE")]
    cluster: Option<String>,

    /// With --json, every row too.
    #[arg(long)]
    rows: bool,

    /// Write every row with its prediction.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Write a scatter plot of predicted over measured time.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write the scores as a Markdown table.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,

    /// Also fit the parameters to all sources but one, for each in turn, and score the one left out: the error on what the fit
    /// has not seen. Takes minutes.
    #[arg(long)]
    cross: bool,

    /// What --cross leaves out at a time: a source, all runs on one GPU, all of one framework, or all of one family of models.
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = By::Source, requires = "cross")]
    by: By,

    /// Fit the parameters to the file first, beginning where one would guess, and use them. Takes a minute.
    #[arg(long, conflicts_with = "cluster")]
    fit: bool,

    /// Print the fitted parameters in use.
    #[arg(long)]
    parameters: bool,
}

/// Values of `--by`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum By {
    Source,
    Gpu,
    Launcher,
    Family,
}

impl From<By> for Split {
    fn from(by: By) -> Split {
        match by {
            By::Source => Split::Source,
            By::Gpu => Split::Gpu,
            By::Launcher => Split::Launcher,
            By::Family => Split::Family,
        }
    }
}

/// Predictions of all chosen runs that one fit of a cross-validation may make.
const EVALUATIONS: u64 = 900;
/// The same of the fit to all sources.
const FIT_EVALUATIONS: u64 = 2400;

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    let path = &arguments.file;
    let refuse = |error: &dyn std::fmt::Display| Failure::bad_input(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| refuse(&error))?;
    let mut cases = load(&text).map_err(|error| refuse(&error))?;
    let mut physics = Physics::default();
    if let Some(name) = &arguments.cluster {
        let cluster = open(name)?;
        physics = Physics::of(&cluster).map_err(Failure::bad_input)?;
        for case in &mut cases.cases {
            case.cluster = cluster.clone();
        }
    }
    if arguments.fit {
        screen.step("fitting the parameters to all sources");
        let fitted = fit(cases.cases.iter(), &Physics::EXPECTED, FIT_EVALUATIONS).map_err(|error| refuse(&error))?;
        screen.say(format!("mean error {:.4} before, {:.4} after, {} runs", fitted.before, fitted.after, fitted.runs));
        physics = fitted.physics;
    }
    let crossed = if arguments.cross {
        screen.step("cross-validation: fitting to all groups but one, for each in turn");
        cross_validate(&cases.cases, arguments.by.into(), &Physics::EXPECTED, EVALUATIONS)
            .map_err(|error| refuse(&error))?
    } else {
        Vec::new()
    };
    let validation = validate(cases, &physics);
    let files = [
        (&arguments.csv, validation.to_csv()),
        (&arguments.svg, scatter(&validation.rows)),
        (&arguments.markdown, validation.to_markdown()),
    ];
    for (path, text) in files {
        if let Some(path) = path {
            write_whole(path, text.as_bytes())?;
            screen.say(format!("written to {}", path.display()));
        }
    }
    show(screen, &validation)?;
    if arguments.parameters || arguments.fit {
        screen.line("")?;
        let mut table = Table::new(["parameter", "value", "meaning"]);
        for parameter in PARAMETERS {
            table.row([parameter.name, &format!("{:.4e}", (parameter.get)(&physics)), parameter.meaning]);
        }
        table.print(screen)?;
    }
    if !crossed.is_empty() {
        screen.line("")?;
        let mut table = Table::new(["left out of the fit", "time median error", "memory median error", "OOM right"]);
        for left in &crossed {
            let shares = [left.time_median_error, left.memory_median_error, left.oom_right];
            table.row(std::iter::once(left.source.clone()).chain(shares.map(share)));
        }
        table.print(screen)?;
    }
    let mut document = validation.to_json(arguments.rows).map_err(Failure::internal)?;
    if let Some(object) = document.as_object_mut().filter(|_| arguments.cross) {
        object.insert("cross_validation".into(), serde_json::to_value(&crossed).map_err(Failure::internal)?);
    }
    screen.document(&document)
}

fn share(value: Option<f64>) -> String {
    value.map_or("-".into(), show_percent)
}

fn show(screen: &Screen, validation: &Validation) -> Result<(), Failure> {
    let mut table = Table::new([
        "source",
        "rows",
        "timed",
        "time median",
        "p90",
        "bias",
        "peaks",
        "memory median",
        "p90",
        "OOM right",
        "rank",
        "regret",
    ]);
    let signed = |value: Option<f64>| value.map_or("-".into(), |v| format!("{:+.1} %", v * 100.0));
    for s in &validation.sources {
        table.row([
            s.source.clone(),
            s.rows.to_string(),
            s.scored_time.to_string(),
            share(s.time_median_error),
            share(s.time_p90_error),
            signed(s.time_bias),
            s.scored_memory.to_string(),
            share(s.memory_median_error),
            share(s.memory_p90_error),
            share(s.oom.right()),
            s.rank_correlation.map_or("-".into(), |r| format!("{r:.2}")),
            share(s.regret),
        ]);
    }
    table.print(screen)?;
    let skipped: Vec<&SourceScore> = validation.sources.iter().filter(|s| !s.skipped.is_empty()).collect();
    if !skipped.is_empty() {
        screen.line(screen.style(Style::Bold, "\n  not predicted, or not scored, and why:"))?;
        for source in skipped {
            for (reason, count) in &source.skipped {
                screen.line(format!("    {}: {count} x {reason}", source.source))?;
            }
        }
    }
    Ok(())
}
