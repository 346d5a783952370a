//! Where output goes. Standard output is data (tables, or one JSON document with `--json`); standard error is talk
//! (progress, warnings, errors). Colour follows `--color`, NO_COLOR and whether the stream is a terminal, and never carries
//! meaning alone.

use crate::failure::Failure;
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// When to colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ColorChoice {
    /// On terminals, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The user's choices about output, decided once.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    json: bool,
    quiet: bool,
    color_out: bool,
    color_err: bool,
}

/// The few styles in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Bold,
    Dim,
    Good,
    Bad,
    Warning,
    Accent,
}

impl Style {
    fn code(self) -> &'static str {
        match self {
            Style::Bold => "1",
            Style::Dim => "2",
            Style::Good => "32",
            Style::Bad => "31;1",
            Style::Warning => "33",
            Style::Accent => "36",
        }
    }
}

fn paint(on: bool, style: Style, text: &str) -> String {
    if on { format!("\x1b[{}m{text}\x1b[0m", style.code()) } else { text.to_string() }
}

impl Screen {
    /// From the global flags and the environment.
    pub fn new(json: bool, quiet: bool, choice: ColorChoice) -> Screen {
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        let decide = |terminal: bool| match choice {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => terminal && !no_color && !dumb,
        };
        Screen {
            json,
            quiet,
            color_out: decide(std::io::stdout().is_terminal()),
            color_err: decide(std::io::stderr().is_terminal()),
        }
    }

    /// Whether standard output carries one JSON document.
    pub fn json(&self) -> bool {
        self.json
    }

    /// Whether standard output may carry colour.
    pub fn color(&self) -> bool {
        self.color_out
    }

    /// Columns of the terminal, 100 where there is none.
    pub fn width(&self) -> usize {
        let (rows, columns) = console::Term::stdout().size();
        if std::io::stdout().is_terminal() && rows > 0 { usize::from(columns).max(40) } else { 100 }
    }

    /// Styled text for standard output.
    pub fn style(&self, style: Style, text: impl AsRef<str>) -> String {
        paint(self.color_out, style, text.as_ref())
    }

    /// One line of data on standard output; nothing with `--json`.
    pub fn line(&self, text: impl AsRef<str>) -> Result<(), Failure> {
        if self.json { Ok(()) } else { write_out(&format!("{}\n", text.as_ref())) }
    }

    /// The JSON document on standard output, with `--json` only.
    pub fn document<T: Serialize>(&self, value: &T) -> Result<(), Failure> {
        if !self.json {
            return Ok(());
        }
        let mut text = serde_json::to_string_pretty(value).map_err(Failure::internal)?;
        text.push('\n');
        write_out(&text)
    }

    /// Talk on standard error: what is going on. Silent with `--quiet`.
    pub fn say(&self, text: impl AsRef<str>) {
        if !self.quiet {
            eprintln!("{}", text.as_ref());
        }
    }

    /// A step of long work, on standard error.
    pub fn step(&self, text: impl AsRef<str>) {
        self.say(format!(
            "{} {}",
            paint(self.color_err, Style::Accent, "==>"),
            paint(self.color_err, Style::Bold, text.as_ref())
        ));
    }

    /// A warning on standard error, also with `--quiet` off only.
    pub fn warn(&self, text: impl AsRef<str>) {
        self.say(format!("{}: {}", paint(self.color_err, Style::Warning, "warning"), text.as_ref()));
    }

    /// The error that ends the command, with its hint, on standard error; never silenced.
    pub fn fail(&self, failure: &Failure) {
        eprintln!("{}: {}", paint(self.color_err, Style::Bad, "error"), failure.message());
        if let Some(hint) = failure.advice() {
            eprintln!("{}: {hint}", paint(self.color_err, Style::Accent, "hint"));
        }
    }

    /// A progress bar on standard error; where that is no terminal, a line now and then.
    pub fn progress(&self, length: u64, what: &str) -> Progress {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(length),
            if terminal && !self.quiet { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() },
        );
        if let Ok(style) =
            ProgressStyle::with_template("    {prefix} [{bar:30}] {pos}/{len} {elapsed_precise} {wide_msg}")
        {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what.to_string());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        Progress { bar, plain: !terminal && !self.quiet, what: what.to_string(), length, said: 0 }
    }
}

/// Progress of one piece of long work.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    plain: bool,
    what: String,
    length: u64,
    said: u64,
}

impl Progress {
    /// `done` of the length given, with a few words.
    pub fn set(&mut self, done: u64, message: impl AsRef<str>) {
        self.bar.set_position(done);
        self.bar.set_message(message.as_ref().to_string());
        let eighth = (self.length / 4).max(1);
        if self.plain && done / eighth > self.said {
            self.said = done / eighth;
            eprintln!("    {} {done}/{} {}", self.what, self.length, message.as_ref());
        }
    }
}

impl Progress {
    /// The length became known, or has changed.
    pub fn resize(&mut self, length: u64) {
        self.length = length;
        self.bar.set_length(length);
    }

    /// `done` of the length given, on terminals only.
    pub fn at(&mut self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_string());
    }

    /// A line above the bar, or by itself where there is no terminal.
    pub fn above(&self, screen: &Screen, line: &str) {
        self.bar.suspend(|| screen.say(line));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Writes to standard output; a reader that closed the pipe is not an error.
fn write_out(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        Err(e) => Err(Failure::internal(format!("cannot write to standard output: {e}"))),
    }
}
