//! `paceline states`: the 27 state partitions side by side.

use crate::commands::cluster;
use crate::failure::Failure;
use crate::job_source::JobSource;
use crate::screen::{Screen, Style};
use crate::table::{Table, show_percent, show_seconds};
use clap::Args;
use paceline_planner::predict::{ClusterRequest, RequestError};
use paceline_planner::states::{
    Explanation, Fit, GainComparison, GatherComparison, StateRow, StatesError, compare_gathers, compare_published,
    explain_published, fit_published, published_of, range_unfitted, tabulate,
};
use paceline_profiles::find_cluster;
use paceline_sim::cluster::Physics;
use paceline_sim::units::show_bytes;
use serde::Serialize;

/// Compare the 27 ways to partition parameters, gradients and optimizer states.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example: paceline states --model llama-65b --cluster paro-a100-roce --nodes 4 --seq 512 --global-batch 1280 \
                        --micro-batch 4 --recompute full"
)]
pub struct Arguments {
    #[command(flatten)]
    pub source: JobSource,
    /// Show the dominated partitions too, with what dominates them.
    #[arg(long)]
    all: bool,
    /// Instead of a job: the published gains of PaRO beside prediction and guideline, and its two-level all-gather.
    #[arg(long)]
    published: bool,
    /// With --published: the same with each cause changed by itself, to see what explains how much.
    #[arg(long, requires = "published")]
    explain: bool,
}

#[derive(Debug, Serialize)]
struct Document<'a> {
    format: &'static str,
    configuration: &'a ClusterRequest,
    states: &'a [StateRow],
    /// Published gains of this job, where it is one of PaRO's.
    #[serde(skip_serializing_if = "<[GainComparison]>::is_empty")]
    published: &'a [GainComparison],
}

#[derive(Debug, Serialize)]
struct Published<'a> {
    format: &'static str,
    gains: &'a [GainComparison],
    gathers: &'a [GatherComparison],
    /// What the paper leaves open, chosen to fit all gains.
    fit: &'a Fit,
    /// Least and greatest gain over all that is plausible of it, without a choice.
    unfitted: &'a [(f64, f64)],
    #[serde(skip_serializing_if = "<[Explanation]>::is_empty")]
    explanations: &'a [Explanation],
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if arguments.published {
        return published(screen, arguments.explain);
    }
    let request = cluster::request(&arguments.source)?;
    let cluster = request.cluster().map_err(|error| cluster::refused(&arguments.source, error))?;
    let physics = Physics::of(&cluster).map_err(|error| cluster::refused(&arguments.source, error.into()))?;
    let rows = tabulate(&request, &physics).map_err(|error| refused(&arguments.source, error))?;
    show(screen, &request, &rows, arguments.all)?;
    let published = published_of(&request).map_err(|error| refused(&arguments.source, error))?;
    if !published.is_empty() {
        screen.line("\nThis is a job of PaRO (NeurIPS 2024). Throughput gains, with DeepSpeed's default buckets:")?;
        show_gains(screen, &published)?;
    }
    screen.document(&Document {
        format: "paceline.states/1",
        configuration: &request,
        states: &rows,
        published: &published,
    })
}

fn refused(source: &JobSource, error: StatesError) -> Failure {
    match error {
        StatesError::Request(error) => cluster::refused(source, error),
        StatesError::Predict(error) => Failure::bad_input(error),
    }
}

fn show(screen: &Screen, request: &ClusterRequest, rows: &[StateRow], all: bool) -> Result<(), Failure> {
    let fastest = |row: &&StateRow| row.fits && row.effective;
    let best = rows.iter().filter(fastest).min_by(|a, b| a.iteration_seconds.total_cmp(&b.iteration_seconds));
    let place = |row: &StateRow| {
        let before = |other: &&StateRow| {
            other.fits && other.effective && other.guideline_seconds < row.guideline_seconds * (1.0 - 1e-9)
        };
        1 + rows.iter().filter(before).count()
    };
    let mut shown: Vec<&StateRow> = rows.iter().filter(|row| all || row.effective).collect();
    shown.sort_by(|a, b| {
        (!a.fits, a.iteration_seconds).partial_cmp(&(!b.fits, b.iteration_seconds)).unwrap_or(std::cmp::Ordering::Equal)
    });
    screen.line(format!(
        "{} on {} node{} of {}: states N whole, I within a group, G over all ranks",
        request.model,
        request.nodes.unwrap_or(1),
        if request.nodes.unwrap_or(1) == 1 { "" } else { "s" },
        request.cluster
    ))?;
    let mut table = Table::new([
        "p g os",
        "",
        "step",
        "samples/s",
        "memory",
        "states",
        "gather p",
        "reduce g",
        "sync g",
        "sync p",
        "exposed",
        "guideline",
        "place",
        "",
    ]);
    for row in shown {
        let style = if best.is_some_and(|best| best.triple == row.triple) {
            Some(Style::Good)
        } else if row.fits {
            None
        } else {
            Some(Style::Dim)
        };
        let place = if row.fits { place(row).to_string() } else { String::new() };
        table.styled(style, cells(row, place));
    }
    table.print(screen)?;
    screen.line(
        "\n  gather p ... sync p: communication of a step as if nothing hid it; exposed: what it costs.\n  guideline: PaRO's closed \
         form, the longer of communication and computation; place: by its indicator log(1/T) among those that fit.",
    )?;
    if let Some(best) = best {
        let most = show_bytes(best.memory_bytes.round() as u64);
        screen.line(format!(
            "  best that fits: {} with {} in {most}",
            best.triple,
            show_seconds(best.iteration_seconds)
        ))
    } else {
        screen.line("  none fits; try --recompute full, more nodes, or tensor or pipeline parallelism")
    }
}

fn cells(row: &StateRow, place: String) -> [String; 14] {
    let parts = &row.parts;
    let verdict = match (&row.dominated_by, row.fits) {
        (Some(by), true) => format!("dominated by {by}"),
        (Some(by), false) => format!("does not fit, dominated by {by}"),
        (None, false) => "does not fit".into(),
        (None, true) => String::new(),
    };
    [
        row.triple.clone(),
        row.names.iter().find(|name| !name.starts_with("paro")).map_or(String::new(), |name| (*name).into()),
        show_seconds(row.iteration_seconds),
        format!("{:.1}", row.samples_per_second),
        show_bytes(row.memory_bytes.round() as u64),
        show_bytes(row.state_bytes.round() as u64),
        or_nothing(parts.parameter_gather),
        or_nothing(parts.gradient_reduction),
        or_nothing(parts.gradient_sync),
        or_nothing(parts.parameter_sync),
        or_nothing(parts.exposed),
        show_seconds(row.guideline_seconds),
        place,
        verdict,
    ]
}

fn or_nothing(seconds: f64) -> String {
    if seconds > 0.0 { show_seconds(seconds) } else { "-".into() }
}

fn published(screen: &Screen, explain: bool) -> Result<(), Failure> {
    let physics = Physics::default();
    let gains = compare_published(&physics).map_err(|error| refused(&JobSource::default(), error))?;
    let cluster = find_cluster("paro-a100-roce").map_err(|error| Failure::internal(RequestError::from(error)))?;
    let gathers = compare_gathers(cluster, &physics, 1e9);
    screen.line(
        "PaRO (NeurIPS 2024): throughput gains on 4 x 8 A100-80G, sequence 512, microbatch 4, 10 accumulated; full \
         recomputation at 65B",
    )?;
    show_gains(screen, &gains)?;
    let fit = fit_published(&physics).map_err(|error| refused(&JobSource::default(), error))?;
    let unfitted = range_unfitted(&physics).map_err(|error| refused(&JobSource::default(), error))?;
    show_fit(screen, &gains, &fit, &unfitted)?;
    let mut explanations = Vec::new();
    if explain {
        explanations = explain_published(&physics).map_err(|error| refused(&JobSource::default(), error))?;
        show_explanations(screen, &gains, &explanations)?;
    }
    screen
        .line("\n1 GB all-gather in two levels (PaRO-CC) against the flat ring; published: 25.2 to 39.7 % less time")?;
    let mut table = Table::new(["GPUs", "flat ring", "two levels", "gain", "gain, fitted"]);
    for (g, fitted) in gathers.iter().zip(&fit.gathers) {
        table.row([
            g.ranks.to_string(),
            show_seconds(g.flat_seconds),
            show_seconds(g.two_level_seconds),
            show_percent(g.gain),
            show_percent(*fitted),
        ]);
    }
    table.print(screen)?;
    screen.line("  fitted: with the choice above, and one level after the other, as the released code goes")?;
    screen.line(format!("\n  cluster figures: {}", cluster.source))?;
    screen.document(&Published {
        format: "paceline.states-published/1",
        gains: &gains,
        gathers: &gathers,
        fit: &fit,
        unfitted: &unfitted,
        explanations: &explanations,
    })
}

/// The gains under the best choice of what the paper leaves open, and without one.
fn show_fit(screen: &Screen, gains: &[GainComparison], fit: &Fit, unfitted: &[(f64, f64)]) -> Result<(), Failure> {
    screen.line("\nWhat the paper leaves open, chosen to fit these gains together (a fit, no prediction):")?;
    let signed = |gain: f64| format!("{:+.0} %", 100.0 * gain);
    let mut table = Table::new(["model", "trained", "", "published", "fitted", "without a choice"]);
    for ((g, fitted), (low, high)) in gains.iter().zip(&fit.gains).zip(unfitted) {
        table.row([
            g.model.to_string(),
            g.trainable.to_string(),
            format!("{} over {}", g.faster, g.slower),
            signed(g.published),
            signed(*fitted),
            format!("{} to {}", signed(*low), signed(*high)),
        ]);
    }
    table.print(screen)?;
    let chosen = &fit.chosen;
    screen.line(format!(
        "  fitted: {:.0} us for a step between nodes; rings over all GPUs of N nodes take 1 + {:.2} (1 - 1/N) times as long as their bytes;\n  \
         a sixteenth of the parameters are {}. Typical factor between predicted and published ratios: {:.2} fitted, {:.2} before.\n  \
         without a choice: from 14 to 75 us, rings as fast as their links to half as fast on many nodes, the last blocks or spread.",
        chosen.step_us,
        chosen.crowding,
        if chosen.last_blocks { "the last blocks" } else { "spread over all blocks" },
        fit.error.exp(),
        fit.error_before.exp()
    ))
}

/// The predicted gains with each cause changed by itself.
fn show_explanations(screen: &Screen, gains: &[GainComparison], rows: &[Explanation]) -> Result<(), Failure> {
    screen.line("\nPredicted gains with one thing changed:")?;
    let signed = |gain: f64| format!("{:+.0} %", 100.0 * gain);
    let heads = gains.iter().map(|g| {
        let model = g.model.trim_start_matches("llama-");
        format!("{model} {} {}/{}", g.trainable, g.faster, g.slower)
    });
    let mut table = Table::new(std::iter::once(String::new()).chain(heads));
    table.row(std::iter::once("published".to_string()).chain(gains.iter().map(|g| signed(g.published))));
    for row in rows {
        let name = match (row.change, row.held) {
            ("", _) => "predicted".to_string(),
            (change, true) => change.to_string(),
            (change, false) => format!("if {change}"),
        };
        table.row(std::iter::once(name).chain(row.gains.iter().map(|gain| signed(*gain))));
    }
    table.print(screen)
}

fn show_gains(screen: &Screen, gains: &[GainComparison]) -> Result<(), Failure> {
    let mut table = Table::new(["model", "trained", "", "published", "predicted", "without overlap", "guideline"]);
    let signed = |gain: f64| format!("{:+.0} %", 100.0 * gain);
    for g in gains {
        table.row([
            g.model.to_string(),
            g.trainable.to_string(),
            format!("{} over {}", g.faster, g.slower),
            signed(g.published),
            signed(g.overlapped),
            signed(g.one_after_the_other),
            signed(g.guideline),
        ]);
    }
    table.print(screen)?;
    screen.line(
        "  The guideline prices every collective over all ranks as one flat ring at the bandwidth of one pair of GPUs, without overlap\n  \
         between parts. The prediction does what DeepSpeed 0.10 and PaRO's code do (--runtime deepspeed): stages 1 and 2 wait for a\n  \
         reduction to every owner, stage 3 gathers matrix by matrix as far ahead as it may. Assumed, not published: an adapter per\n  \
         GPU, and 75 us for a step between nodes, with which PaRO-CC gains what was published. See docs/accuracy.md, or --explain.",
    )
}
