//! `paceline tui`: the terminal UI.

use crate::failure::Failure;
use crate::interrupt;
use crate::job_source::JobSource;
use crate::local::Local;
use crate::profile_store;
use crate::screen::Screen;
use crate::user_folder::user_folder;
use crate::workshop::LocalWorkshop;
use paceline_tui::app::{App, Notice};
use paceline_tui::desk::Desk;
use paceline_tui::event::Effect;
use paceline_tui::settings::Settings;
use paceline_tui::terminal;
use paceline_tui::theme::Palette;
use paceline_tui::visit::Visit;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use toml::Table;

/// Turn the knobs of a job and see at once what becomes of its memory and time.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    after_help = "Examples:\n  paceline tui\n  paceline tui job.toml\n  paceline tui --model llama-3-70b --cluster dgx-h100-ib --nodes 64 --seq 8192 --global-batch 512 --tp 8 --pp 4\n\n`?` shows the keys."
)]
pub struct Arguments {
    #[command(flatten)]
    pub source: JobSource,

    /// Profile of this machine (default: as for `paceline predict`).
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,

    /// A recorded timeline to lay under the predicted one: a trace of `paceline run --trace` or `--perfetto`.
    #[arg(long, value_name = "FILE")]
    pub measured: Option<PathBuf>,

    /// Colours (default: those of the last visit; none with NO_COLOR).
    #[arg(long, value_enum, value_name = "THEME")]
    pub theme: Option<Theme>,

    /// Neither read nor keep the state of the last visit.
    #[arg(long)]
    pub fresh: bool,
}

/// Colours by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Theme {
    /// For dark backgrounds.
    Dark,
    /// For light backgrounds.
    Light,
    /// None.
    Mono,
}

/// Runs the command.
pub fn run(screen: &Screen, arguments: &Arguments) -> Result<(), Failure> {
    if screen.json() || !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let what = if screen.json() { "`paceline tui` has no --json" } else { "this is not a terminal" };
        return Err(Failure::bad_input(format!("{what}, and the terminal UI needs one"))
            .hint("`paceline predict --json` with the same job prints the same figures, `paceline plan --json` the same plans"));
    }
    let local = Local::open(screen, arguments.profile.as_deref())?;
    let local = local.for_views();
    let (job, notice) = match job(&arguments.source) {
        Ok(job) => (job, None),
        // The view opens all the same, with something to turn the knobs of.
        Err(failure) => {
            let text = format!("{}; showing the default", failure.message().replace('\n', " "));
            (Settings::usual().table(), Some(Notice { text, bad: true }))
        }
    };
    let path = if arguments.fresh || notice.is_some() { None } else { state_path(arguments.source.job.as_deref()) };
    let visit = path.as_deref().and_then(Visit::read);
    let notice_free = notice.is_none();
    let settings = visit.as_ref().map_or_else(|| Settings::from_table(&job), |visit| visit.settings(&job));
    let palette = palette(screen, arguments.theme, visit.as_ref().and_then(|visit| visit.palette));
    let (mut app, mut effects) = App::new(settings, palette, notice);
    // Without a job nothing is fixed.
    if notice_free && !arguments.source.is_empty()? {
        app.job = job.clone();
    }
    if let Some(visit) = &visit {
        effects = visit.restore(&mut app);
    }
    let stop = interrupt::flag()?;
    let (sender, events) = channel();
    let mut desk = Desk::open(local, sender.clone()).with_workshop(Arc::new(LocalWorkshop {
        checkpoints: checkpoints(arguments.source.job.as_deref()),
        profile: arguments.profile.clone().or_else(profile_store::user_path),
    }));
    if let Some(path) = &arguments.measured {
        effects.push(Effect::Load(path.display().to_string()));
    }
    let shown = terminal::show(&mut app, effects, &mut desk, (sender, events), &stop);
    if desk.is_at_work() {
        screen.say("a run or a measurement comes to its end; Ctrl-C leaves at once");
    }
    desk.close();
    shown.map_err(|error| Failure::internal(format!("the terminal UI ended: {error}")))?;
    if let Some(path) = path
        && let Err(error) = Visit::of(&app, &job).write(&path)
    {
        screen.warn(format!("the state of this visit is not kept: {}: {error}", path.display()));
    }
    Ok(())
}

/// Where the checkpoints of a job's runs go: beside it, and without one in the working folder.
fn checkpoints(job: Option<&Path>) -> PathBuf {
    job.map_or_else(|| PathBuf::from("paceline.checkpoints"), |job| job.with_extension("checkpoints"))
}

/// The keys of the job, those of the default where none is named.
fn job(source: &JobSource) -> Result<Table, Failure> {
    if source.is_empty()? { Ok(Settings::usual().table()) } else { source.placed_table() }
}

fn palette(screen: &Screen, asked: Option<Theme>, last: Option<Palette>) -> Palette {
    match asked {
        Some(Theme::Dark) => Palette::Dark,
        Some(Theme::Light) => Palette::Light,
        Some(Theme::Mono) => Palette::Mono,
        None if !screen.color() => Palette::Mono,
        None => last.unwrap_or_else(background),
    }
}

/// Terminals that say so have the number of their background after the last `;` of COLORFGBG; 7 and 15 are white.
fn background() -> Palette {
    let said = std::env::var("COLORFGBG").unwrap_or_default();
    if matches!(said.rsplit(';').next(), Some("7" | "15")) { Palette::Light } else { Palette::Dark }
}

/// Where the last visit to a job is kept: `$XDG_STATE_HOME` or `~/.local/state`, and there `paceline/tui/`.
fn state_path(job: Option<&Path>) -> Option<PathBuf> {
    let name = match job {
        None => "default.toml".to_string(),
        Some(job) => {
            let whole = job.canonicalize().unwrap_or_else(|_| job.to_owned());
            let mut hasher = DefaultHasher::new();
            whole.hash(&mut hasher);
            format!("{}-{:016x}.toml", job.file_stem().unwrap_or_default().to_string_lossy(), hasher.finish())
        }
    };
    Some(user_folder("XDG_STATE_HOME", ".local/state")?.join("tui").join(name))
}
