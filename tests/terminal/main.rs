//! The terminal UI in a real terminal: tmux plays it, and what it shows is read back. Without tmux the test says so and passes.
//! With PACELINE_SCREENS=docs/screens the screens of the views are drawn there.

mod panics;
mod svg;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Longest wait for a screen. Screens come in milliseconds; a busy machine may take its time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A terminal of its own server, ended with the test.
struct Terminal {
    server: String,
    folder: PathBuf,
    width: u16,
}

impl Terminal {
    /// A terminal that runs a command line in a folder of its own; none without tmux.
    fn run(name: &str, arguments: &str, size: (u16, u16)) -> Option<Terminal> {
        Terminal::play(name, &format!("{} {arguments}", env!("CARGO_BIN_EXE_paceline")), size)
    }

    /// The same with another program.
    fn play(name: &str, command: &str, (width, height): (u16, u16)) -> Option<Terminal> {
        let found = Command::new("tmux").arg("-V").output().is_ok_and(|output| output.status.success());
        if !found {
            eprintln!("skipped: tmux is not installed");
            return None;
        }
        let folder = std::env::temp_dir().join(format!("paceline-terminal-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let terminal = Terminal { server: format!("paceline-{name}-{}", std::process::id()), folder, width };
        let line = format!(
            "cd {folder} && export XDG_STATE_HOME={folder} XDG_DATA_HOME={folder} TERM=xterm-256color; {command}; echo ended with $?; stty -a; sleep 60",
            folder = terminal.folder.display(),
        );
        let (width, height) = (width.to_string(), height.to_string());
        let made = terminal.tmux(&["-f", "/dev/null", "new-session", "-d", "-x", &width, "-y", &height, &line]);
        assert!(made.status.success(), "{made:?}");
        Some(terminal)
    }

    fn tmux(&self, arguments: &[&str]) -> Output {
        Command::new("tmux").args(["-L", &self.server]).args(arguments).env_remove("TMUX").output().unwrap()
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.tmux(&["capture-pane", "-p"]).stdout).into_owned()
    }

    /// The folder for drawings, where they are wanted.
    fn screens() -> Option<PathBuf> {
        std::env::var_os("PACELINE_SCREENS").map(PathBuf::from)
    }

    /// Draws what is shown, where drawings are wanted.
    fn draw(&self, name: &str) {
        let Some(folder) = Terminal::screens() else { return };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        fs::create_dir_all(&folder).unwrap();
        let screen = self.tmux(&["capture-pane", "-e", "-p"]).stdout;
        let drawing = svg::drawing(&String::from_utf8_lossy(&screen), self.width);
        fs::write(folder.join(format!("{name}.svg")), drawing).unwrap();
    }

    fn press(&self, keys: &[&str]) {
        for key in keys {
            self.tmux(&["send-keys", key]);
        }
    }

    /// Waits until the phrases are among all that was printed, wrapped lines joined.
    fn left(&self, phrases: &[&str]) {
        let begin = Instant::now();
        loop {
            let all = self.tmux(&["capture-pane", "-p", "-J", "-S", "-"]).stdout;
            let all = String::from_utf8_lossy(&all);
            if phrases.iter().all(|phrase| all.contains(phrase)) {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "waited for {phrases:?}; printed was:\n{all}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The screen as soon as it shows all of the phrases.
    fn shows(&self, phrases: &[&str]) -> String {
        let all = |screen: &str| phrases.iter().all(|phrase| screen.contains(phrase));
        self.until(all, &format!("{phrases:?}"))
    }

    /// The screen as soon as it is as it should be.
    fn until(&self, is_so: impl Fn(&str) -> bool, what: &str) -> String {
        let begin = Instant::now();
        loop {
            let screen = self.screen();
            if is_so(&screen) {
                return screen;
            }
            assert!(begin.elapsed() < PATIENCE, "waited for {what}; the screen:\n{screen}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
        drop(fs::remove_dir_all(&self.folder));
    }
}

/// Cells of the memory bar of the first rank.
fn memory_bar(screen: &str) -> usize {
    let ranks = screen.lines().skip_while(|line| !line.contains("memory: fits"));
    let bar = ranks.skip(1).find(|line| line.contains("r0 ")).expect("a bar of r0");
    bar.chars().filter(|cell| *cell == '█').count()
}

/// Bytes of the fullest rank as the screen says them.
fn memory(screen: &str) -> String {
    let line = screen.lines().find_map(|line| line.split_once("memory: fits, ")).expect("a verdict on memory").1;
    line.split(" of ").next().unwrap().to_owned()
}

fn write_job(folder: &Path) {
    let job = "model = \"llama-3-8b\"\ncluster = \"dgx-h100-ib\"\nnodes = 2\nseq = 4096\nglobal_batch = 64\n";
    fs::write(folder.join("job.toml"), job).unwrap();
}

#[test]
fn a_visit_from_start_to_plan() {
    // The folder is made with the terminal, so the job is a job of flags.
    let flags = "tui --model llama-3-8b --cluster dgx-h100-ib --nodes 2 --seq 4096 --global-batch 64";
    let Some(terminal) = Terminal::run("visit", flags, (120, 40)) else { return };
    let first = terminal.shows(&["Paceline", "llama-3-8b on 2 x 8", "memory: fits", "per iteration", "model could be"]);
    // Down to TP, one notch up: less memory, and the change is shown.
    terminal.press(&["j", "j", "j", "j", "j", "j", "j", "l"]);
    let second = terminal.shows(&["<2", "> + 2", "per iteration +", "memory: fits"]);
    assert_ne!(memory(&first), memory(&second), "the memory moved:\n{second}");
    let (before, after) = (memory_bar(&first), memory_bar(&second));
    assert!(0 < after && after < before, "the bar moved from {before} to {after} cells:\n{second}");
    terminal.draw("predict");
    assert!(second.contains('%') && second.contains("> + 2"), "{second}");
    // A refused value stays and says what is allowed.
    terminal.press(&["0", "Enter"]);
    terminal.shows(&["a whole number from 1 on"]);
    terminal.press(&["Escape"]);
    terminal.press(&["F3"]);
    terminal.shows(&["predicted, 1 ranks", "memory of r0", "critical path"]);
    terminal.press(&["F2", "j", "j", "j", "l", "l", "F3", "c", "c", "n"]);
    terminal.shows(&["predicted, 4 ranks", "idle for", "waits for"]);
    terminal.draw("timeline");
    terminal.press(&["F4", "s"]);
    let plans = terminal.shows(&["candidates in", "configuration", "times the bound"]);
    terminal.draw("plan");
    terminal.press(&["v"]);
    terminal.shows(&["tokens/s per GPU over peak memory"]);
    terminal.draw("pareto");
    terminal.press(&["v", "m"]);
    terminal.shows(&["MFU; nodes:", "mixtral-8x7b", "llama-3-8b on 1 node: "]);
    if Terminal::screens().is_some() {
        terminal.until(|screen| !screen.contains("searching: "), "the whole map");
        terminal.draw("map");
    }
    terminal.press(&["Escape", "v"]);
    let best = plans.lines().find(|line| line.trim_start().starts_with("1 ")).expect("a best plan");
    let time: Vec<&str> = best.split_whitespace().skip(1).take(2).collect();
    terminal.press(&["Enter"]);
    terminal.shows(&["opened: ", &format!("{} per iteration", time.join(" "))]);
    terminal.press(&["?"]);
    terminal.shows(&["Keys in Predict"]);
    terminal.press(&["q", "q"]);
    // The terminal is as it was: cooked, with echo, and the views are gone.
    let end = terminal.shows(&["ended with 0", " echo", " icanon"]);
    assert!(!end.contains("Paceline"), "{end}");
}

/// An execution on this machine: begun, stopped, gone on with, and laid under its prediction; then the profile, measured and not.
#[test]
fn a_run_and_a_measurement() {
    let flags = "tui --model demo-1m --seq 64 --global-batch 8 --pp 2 --schedule zb-h1";
    let Some(terminal) = Terminal::run("run", flags, (120, 40)) else { return };
    terminal.shows(&["demo-1m on", "memory: "]);
    terminal.press(&["F5"]);
    terminal.shows(&["no run yet", "s trains the settings"]);
    // More steps than anybody waits for, and a stop.
    terminal.press(&["9", "9", "9", "9", "Enter", "s"]);
    terminal.shows(&["training: step", "of 9999", "tokens/s", "step: predicted", "as predicted", "r1 ", "/s"]);
    terminal.press(&["Escape"]);
    let stopped = terminal.shows(&["stopped after step", "checkpoint paceline.checkpoints"]);
    let after = |screen: &str, words: &str| -> u64 {
        let rest = screen.split_once(words).expect(words).1;
        rest.split_whitespace().next().unwrap().parse().unwrap()
    };
    let done = after(&stopped, "stopped after step ");
    // Forty more, from the checkpoint.
    terminal.press(
        &format!("{}", done + 40)
            .chars()
            .map(String::from)
            .collect::<Vec<_>>()
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>(),
    );
    terminal.press(&["Enter", "r"]);
    let ended = terminal.shows(&[&format!("done: {} steps", done + 40), "loss (line)"]);
    assert!(ended.contains("held out"), "{ended}");
    terminal.draw("run");
    terminal.press(&["F3"]);
    terminal.shows(&["predicted (p) above measured (m), 2 ranks", "in the latest run", "r0p", "r1m"]);
    terminal.draw("timeline-measured");
    terminal.press(&["F6"]);
    terminal.shows(&["rows measured alone", "matmul-nn", "error of each of", "predicted time of the settings"]);
    terminal.draw("calibrate");
    // Stopped: nothing is kept. Then a short one: figures come from it.
    terminal.press(&["s"]);
    terminal.shows(&["measuring: "]);
    terminal.press(&["Escape"]);
    terminal.shows(&["calibration stopped; nothing was written"]);
    assert!(!terminal.folder.join("paceline/cpu-profile.csv").exists());
    terminal.press(&["-", "-", "-", "-", "s"]);
    terminal.shows(&["measured; the profile lies in"]);
    terminal.shows(&["paceline/cpu-profile.csv: "]);
    terminal.press(&["q"]);
    terminal.shows(&["ended with 0", " echo", " icanon"]);
}

#[test]
fn interrupts_small_terminals_and_broken_jobs() {
    let Some(terminal) = Terminal::run("small", "tui", (20, 5)) else { return };
    terminal.shows(&["20 x 5 is too small."]);
    terminal.press(&["C-c"]);
    // What came after is longer than five lines of twenty columns.
    terminal.left(&["ended with 0", "icanon"]);
    drop(terminal);

    let Some(terminal) = Terminal::run("broken", "tui nowhere.toml", (100, 30)) else { return };
    terminal.shows(&["error: job nowhere.toml", "showing the default", "llama-3-8b"]);
    // The size may change under the view.
    terminal.tmux(&["resize-window", "-x", "70", "-y", "20"]);
    terminal.shows(&["F2 Predict", "memory: fits"]);
    terminal.press(&["C-c"]);
    terminal.shows(&["ended with 0", "icanon"]);
}

/// What was turned is there again at the next visit, until the job changes.
#[test]
fn the_last_visit_is_remembered() {
    let Some(terminal) = Terminal::run("memory", "--version", (100, 30)) else { return };
    write_job(&terminal.folder);
    terminal.shows(&["ended with 0"]);
    let visit = format!(
        "clear; XDG_STATE_HOME={folder} {binary} tui {folder}/job.toml; echo visit ended",
        folder = terminal.folder.display(),
        binary = env!("CARGO_BIN_EXE_paceline")
    );
    for (round, shown) in [(0, "<2"), (1, "<4")] {
        terminal.tmux(&["respawn-window", "-k", &format!("{visit}; sleep 60")]);
        if round == 0 {
            terminal.shows(&["model could be"]);
            terminal.press(&["j", "j", "j", "j", "j", "j", "j"]);
            terminal.shows(&["TP could be"]);
        } else {
            terminal.shows(&["<2", "TP could be"]);
        }
        terminal.press(&["l"]);
        terminal.shows(&[shown, "TP could be"]);
        terminal.press(&["q"]);
        // A word that no view shows: the next visit ends this one.
        terminal.shows(&["visit ended"]);
    }
}
