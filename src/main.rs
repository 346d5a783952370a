//! `paceline`: will it fit, how fast will it be, what should I launch?

mod commands;
mod distributed;
mod failure;
mod flags;
mod gpu;
mod interrupt;
mod job_source;
mod local;
mod profile_store;
mod screen;
mod size;
mod table;
mod timeline;
mod trace_file;
mod training;
mod user_folder;
mod workshop;

use clap::{Parser, Subcommand};
use screen::{ColorChoice, Screen};
use std::process::ExitCode;

/// Plan the training of a large model by simulation, run the plan, and correct the model from what was measured.
///
/// Without a command, the demonstration of the whole loop on the bundled job.
#[derive(Debug, Parser)]
#[command(
    name = "paceline",
    version,
    after_help = "Exit codes: 0 done, 1 internal or run-time failure, 2 bad input, 3 no feasible plan, 130 interrupted.\n\nExamples:\n  paceline\n  paceline plan job.toml -o plan.json\n  paceline run plan.json --steps 100"
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// One JSON document on standard output, nothing else there.
    #[arg(long, global = true)]
    json: bool,

    /// No progress and no warnings on standard error.
    #[arg(long, short, global = true)]
    quiet: bool,

    /// When to colour (NO_COLOR is respected).
    #[arg(long, global = true, value_enum, default_value_t = ColorChoice::Auto, value_name = "WHEN")]
    color: ColorChoice,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Calibrate, plan, run, compare and recalibrate on this machine.
    Demo(commands::demo::Arguments),
    /// Memory and time of one configuration.
    Predict(commands::predict::Arguments),
    /// Search for the best configuration.
    Plan(commands::plan::Arguments),
    /// Execute a plan.
    Run(commands::run::Arguments),
    /// Measure this machine, or correct its profile from a measured run.
    Calibrate(commands::calibrate::Arguments),
    /// Hold a predicted trace against a measured one.
    Compare(commands::compare::Arguments),
    /// Build, draw, compare, export and import pipeline schedules.
    Schedule(commands::schedule::Arguments),
    /// Compare the 27 ways to partition parameters, gradients and optimizer states.
    States(commands::states::Arguments),
    /// Hold predictions for clusters against measured runs.
    Validate(commands::validate::Arguments),
    /// A plan as files that start it elsewhere.
    Export(commands::export::Arguments),
    /// A plan as one HTML file: memory, timeline, plans, accuracy, provenance.
    Report(commands::report::Arguments),
    /// The terminal UI: see the memory, the pipeline and the plans, and turn the knobs.
    #[command(alias = "ui")]
    Tui(commands::tui::Arguments),
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let help = !error.use_stderr();
            // A closed pipe while printing help is not worth a message.
            drop(error.print());
            return ExitCode::from(if help { 0 } else { 2 });
        }
    };
    let screen = Screen::new(arguments.json, arguments.quiet, arguments.color);
    let outcome = match arguments.command {
        None => commands::demo::run(&screen, &commands::demo::Arguments::default()),
        Some(Command::Demo(a)) => commands::demo::run(&screen, &a),
        Some(Command::Predict(a)) => commands::predict::run(&screen, &a),
        Some(Command::Plan(a)) => commands::plan::run(&screen, &a),
        Some(Command::Run(a)) => commands::run::run(&screen, &a),
        Some(Command::Calibrate(a)) => commands::calibrate::run(&screen, &a),
        Some(Command::Compare(a)) => commands::compare::run(&screen, &a),
        Some(Command::Schedule(a)) => commands::schedule::run(&screen, &a),
        Some(Command::States(a)) => commands::states::run(&screen, &a),
        Some(Command::Validate(a)) => commands::validate::run(&screen, &a),
        Some(Command::Export(a)) => commands::export::run(&screen, &a),
        Some(Command::Report(a)) => commands::report::run(&screen, &a),
        Some(Command::Tui(a)) => commands::tui::run(&screen, &a),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            screen.fail(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}
