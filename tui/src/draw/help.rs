//! The keys, over whatever is shown.

use crate::app::View;
use crate::theme::Theme;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

const EVERYWHERE: [(&str, &str); 5] = [
    ("Tab, F2..F6", "next view, view by number"),
    ("?", "these keys"),
    ("t", "colours: dark, light, none"),
    ("mouse", "click a tab or a row, turn the wheel"),
    ("q, Ctrl-C", "quit"),
];

fn keys(view: View) -> &'static [(&'static str, &'static str)] {
    match view {
        View::Predict => &[
            ("Up Down, k j", "knob"),
            ("Left Right, h l", "turn it: numbers halve and double"),
            ("digits, Enter", "type a value; Enter takes it, Esc does not"),
            ("x", "back to the default"),
            ("p", "pin: hold figures against this setting"),
            ("PgUp PgDn", "more ranks"),
        ],
        View::Timeline => &[
            ("Up Down, k j", "rank"),
            ("Left Right, h l", "cursor"),
            ("+ -, i o, wheel", "zoom around the cursor"),
            ("PgUp PgDn, H L", "pan"),
            ("0", "see all"),
            ("c", "next pass on the critical path"),
            ("n", "next gap of the rank"),
            ("f", "load a recorded timeline from a file"),
            ("m", "predicted, measured, both"),
        ],
        View::Plan => &[
            ("s, Esc", "search the open axes; stop"),
            ("Up Down, k j", "plan; in the map also left and right"),
            ("o", "order: time, memory, bubble, name"),
            ("/", "filter by words"),
            ("v", "table, memory against speed, map"),
            ("m", "compute the map of models and nodes"),
            ("Enter", "open the plan in Predict"),
            ("w", "write it: a plan to run, or a job"),
            ("e", "export it for another launcher"),
        ],
        View::Run => &[
            ("s", "train the settings of Predict"),
            ("Esc, x", "stop after the present step"),
            ("r", "go on from the latest checkpoint"),
            ("+ -, digits", "steps to be done in all"),
            ("Up Down, k j", "more ranks"),
        ],
        View::Calibrate => &[
            ("s", "measure this machine"),
            ("Esc, x", "stop; nothing is kept then"),
            ("+ -, h l", "measure longer, shorter"),
            ("Up Down, k j", "class: its residuals are drawn"),
        ],
    }
}

/// Draws the keys of a view.
pub fn draw(frame: &mut Frame, view: View, theme: &Theme, area: Rect) {
    let own = keys(view);
    let width = 62.min(area.width);
    let height = (own.len() + EVERYWHERE.len() + 3).min(usize::from(area.height)) as u16;
    let place = Rect::new(area.x + (area.width - width) / 2, area.y + (area.height - height) / 2, width, height);
    let row = |(keys, what): &(&str, &str)| {
        Line::from(vec![Span::styled(format!(" {keys:<16} "), theme.accent), Span::raw((*what).to_string())])
    };
    let mut lines: Vec<Line> = own.iter().map(row).collect();
    lines.push(Line::raw(""));
    lines.extend(EVERYWHERE.iter().map(row));
    let block = Block::bordered().title(format!(" Keys in {} ", view.name())).title_style(theme.title);
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).block(block), place);
}
