//! The terminal UI in a real terminal: tmux plays it, and what it shows is read back. Without tmux the test says so and passes.

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
}

impl Terminal {
    /// A terminal that runs a command line in a folder of its own; none without tmux.
    fn run(name: &str, arguments: &str, (width, height): (u16, u16)) -> Option<Terminal> {
        let found = Command::new("tmux").arg("-V").output().is_ok_and(|output| output.status.success());
        if !found {
            eprintln!("skipped: tmux is not installed");
            return None;
        }
        let folder = std::env::temp_dir().join(format!("paceline-terminal-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let terminal = Terminal { server: format!("paceline-{name}-{}", std::process::id()), folder };
        let line = format!(
            "cd {folder} && XDG_STATE_HOME={folder} TERM=xterm-256color {binary} {arguments}; echo ended with $?; stty -a; sleep 60",
            folder = terminal.folder.display(),
            binary = env!("CARGO_BIN_EXE_paceline"),
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

    fn press(&self, keys: &[&str]) {
        for key in keys {
            self.tmux(&["send-keys", key]);
        }
    }

    /// The screen as soon as it shows all of the phrases.
    fn shows(&self, phrases: &[&str]) -> String {
        let begin = Instant::now();
        loop {
            let screen = self.screen();
            if phrases.iter().all(|phrase| screen.contains(phrase)) {
                return screen;
            }
            assert!(begin.elapsed() < PATIENCE, "waited for {phrases:?}; the screen:\n{screen}");
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
    let second = terminal.shows(&["<2", "TP could be", "memory: fits"]);
    assert_ne!(memory(&first), memory(&second), "the memory moved:\n{second}");
    assert!(second.contains('%') && second.contains("> + 2"), "{second}");
    // A refused value stays and says what is allowed.
    terminal.press(&["0", "Enter"]);
    terminal.shows(&["a whole number from 1 on"]);
    terminal.press(&["Escape"]);
    terminal.press(&["F3"]);
    terminal.shows(&["predicted, 1 ranks", "memory of r0", "critical path"]);
    terminal.press(&["F4", "s"]);
    let plans = terminal.shows(&["candidates in", "configuration", "times the bound"]);
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

#[test]
fn interrupts_small_terminals_and_broken_jobs() {
    let Some(terminal) = Terminal::run("small", "tui", (20, 5)) else { return };
    terminal.shows(&["20 x 5 is too small."]);
    terminal.press(&["C-c"]);
    // What came after is longer than five lines.
    terminal.tmux(&["resize-window", "-x", "100", "-y", "30"]);
    terminal.shows(&["ended with 0", "icanon"]);
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
        "clear; XDG_STATE_HOME={folder} {binary} tui {folder}/job.toml; echo over",
        folder = terminal.folder.display(),
        binary = env!("CARGO_BIN_EXE_paceline")
    );
    for (round, shown) in [(0, "<2"), (1, "<4")] {
        terminal.tmux(&["respawn-window", "-k", &format!("{visit}; sleep 60")]);
        if round == 0 {
            terminal.shows(&["model could be"]);
            terminal.press(&["j", "j", "j", "j", "j", "j", "j"]);
            terminal.shows(&["TP could be"]);
        }
        terminal.press(&["l"]);
        terminal.shows(&[shown, "TP could be"]);
        terminal.press(&["q"]);
        terminal.shows(&["over"]);
    }
}
