//! The terminal: raw mode, the alternate screen and the mouse, given back whatever happens; and the loop of events.

use crate::app::App;
use crate::desk::Desk;
use crate::draw::draw;
use crate::event::{Effect, Event};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, DisableMouseCapture, EnableMouseCapture};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use std::io::{self, Stdout, stdout};
use std::sync::Arc;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the loop looks whether it has been told to end, with nothing else to do.
const LOOK: Duration = Duration::from_millis(250);

/// The terminal while it is ours.
struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

/// Whether the terminal is ours. It is given back once: leaving the alternate screen moves the cursor to where it was, and a
/// second time would print over what came after.
static TAKEN: AtomicBool = AtomicBool::new(false);

fn give_back() {
    if !TAKEN.swap(false, Ordering::Relaxed) {
        return;
    }
    // As much as can be given back is; the terminal may be gone.
    drop(execute!(stdout(), DisableMouseCapture, LeaveAlternateScreen, Show));
    drop(disable_raw_mode());
}

/// Whether a thread has panicked since the terminal was taken: then its message is on the terminal, and nothing is drawn over it.
static PANICKED: AtomicBool = AtomicBool::new(false);

/// A panic, of whatever thread, gives the terminal back before its message is printed.
fn guard_panics() {
    static GUARD: Once = Once::new();
    GUARD.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICKED.store(true, Ordering::Relaxed);
            give_back();
            before(panic);
        }));
    });
}

impl Screen {
    fn take() -> io::Result<Screen> {
        guard_panics();
        TAKEN.store(true, Ordering::Relaxed);
        if let Err(error) = enable_raw_mode() {
            TAKEN.store(false, Ordering::Relaxed);
            return Err(error);
        }
        let taken = execute!(stdout(), EnterAlternateScreen, EnableMouseCapture)
            .and_then(|()| Terminal::new(CrosstermBackend::new(stdout())));
        match taken {
            Ok(terminal) => Ok(Screen { terminal }),
            Err(error) => {
                give_back();
                Err(error)
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

/// The thread that reads keys, until it is told to end.
fn read_keys(events: Sender<Event>, end: Arc<AtomicBool>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        while !end.load(Ordering::Relaxed) {
            match event::poll(LOOK) {
                Ok(false) => continue,
                Ok(true) => {}
                // The terminal is gone, and with it whoever would press keys.
                Err(_) => return,
            }
            let event = match event::read() {
                Ok(event::Event::Key(key)) => Event::Key(key),
                Ok(event::Event::Mouse(mouse)) => Event::Mouse(mouse),
                Ok(event::Event::Resize(..)) => Event::Resize,
                Ok(_) => continue,
                Err(_) => return,
            };
            if events.send(event).is_err() {
                return;
            }
        }
    })
}

/// Shows the state until it is left, or until `stop` is raised from outside.
///
/// # Errors
/// When the terminal cannot be used.
pub fn show(
    app: &mut App,
    first: Vec<Effect>,
    desk: &mut Desk,
    (sender, events): (Sender<Event>, Receiver<Event>),
    stop: &AtomicBool,
) -> io::Result<()> {
    let mut screen = Screen::take()?;
    let end = Arc::new(AtomicBool::new(false));
    let keys = read_keys(sender, end.clone());
    let outcome = follow(app, first, desk, &events, stop, &mut screen);
    end.store(true, Ordering::Relaxed);
    drop(screen);
    // It ends within one look, or has ended with the terminal.
    drop(keys.join());
    outcome
}

fn follow(
    app: &mut App,
    first: Vec<Effect>,
    desk: &mut Desk,
    events: &Receiver<Event>,
    stop: &AtomicBool,
    screen: &mut Screen,
) -> io::Result<()> {
    let mut effects = first;
    loop {
        for effect in effects.drain(..) {
            if effect == Effect::Quit {
                return Ok(());
            }
            desk.carry_out(effect);
        }
        if PANICKED.load(Ordering::Relaxed) {
            return Err(io::Error::other("a thread panicked, which is a bug"));
        }
        let mut targets = Vec::new();
        screen.terminal.draw(|frame| targets = draw(frame, app))?;
        app.drawn(targets);
        // One frame for all that has happened meanwhile.
        let mut next = loop {
            match events.recv_timeout(LOOK) {
                Ok(event) => break Some(event),
                Err(RecvTimeoutError::Timeout) if PANICKED.load(Ordering::Relaxed) => break None,
                Err(RecvTimeoutError::Timeout) if !stop.load(Ordering::Relaxed) => {}
                Err(_) => return Ok(()),
            }
        };
        while let Some(event) = next {
            effects.extend(app.on(event));
            next = events.try_recv().ok();
        }
    }
}
