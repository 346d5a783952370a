//! Colours. Nothing is said by colour alone: without colours, letters stand for classes, and words for states.

use ratatui::style::{Color, Modifier, Style};
use serde::{Deserialize, Serialize};

use crate::activity::{KIND_NAMES, KINDS};
use crate::figures::{CLASS_NAMES, CLASSES, PART_NAMES, PARTS};
use crate::lanes::What;
use paceline_sim::program::Pass;

/// Which colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Palette {
    /// For dark backgrounds.
    #[default]
    Dark,
    /// For light backgrounds.
    Light,
    /// None at all.
    Mono,
}

/// The styles of a palette.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Theme {
    /// Where it comes from.
    pub palette: Palette,
    /// Headings.
    pub title: Style,
    /// What has the focus.
    pub selected: Style,
    /// What matters less.
    pub dim: Style,
    /// Good news.
    pub good: Style,
    /// Bad news.
    pub bad: Style,
    /// Neither.
    pub warn: Style,
    /// Keys and names.
    pub accent: Style,
    classes: [Color; CLASSES],
    parts: [Color; PARTS],
}

const fn indexed<const N: usize>(codes: [u8; N]) -> [Color; N] {
    let mut colours = [Color::Reset; N];
    let mut n = 0;
    while n < N {
        colours[n] = Color::Indexed(codes[n]);
        n += 1;
    }
    colours
}

impl Palette {
    /// The next palette.
    pub fn next(self) -> Palette {
        match self {
            Palette::Dark => Palette::Light,
            Palette::Light => Palette::Mono,
            Palette::Mono => Palette::Dark,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Palette::Dark => "dark",
            Palette::Light => "light",
            Palette::Mono => "mono",
        }
    }

    /// Its styles.
    pub fn theme(self) -> Theme {
        let plain = Style::new();
        let of = |code: u8| plain.fg(Color::Indexed(code));
        match self {
            Palette::Dark => Theme {
                palette: self,
                title: plain.add_modifier(Modifier::BOLD),
                selected: plain.fg(Color::Indexed(231)).bg(Color::Indexed(24)).add_modifier(Modifier::BOLD),
                dim: of(245),
                good: of(114),
                bad: of(210).add_modifier(Modifier::BOLD),
                warn: of(221),
                accent: of(117),
                classes: indexed([68, 173, 107, 176, 80, 179, 245]),
                parts: indexed([71, 178, 68, 74, 110, 80, 116, 239, 140]),
            },
            Palette::Light => Theme {
                palette: self,
                title: plain.add_modifier(Modifier::BOLD),
                selected: plain.fg(Color::Indexed(16)).bg(Color::Indexed(153)).add_modifier(Modifier::BOLD),
                dim: of(242),
                good: of(28),
                bad: of(124).add_modifier(Modifier::BOLD),
                warn: of(130),
                accent: of(25),
                classes: indexed([25, 130, 64, 90, 30, 136, 244]),
                parts: indexed([28, 136, 25, 31, 61, 30, 37, 250, 97]),
            },
            Palette::Mono => Theme {
                palette: self,
                title: plain.add_modifier(Modifier::BOLD),
                selected: plain.add_modifier(Modifier::REVERSED),
                dim: plain,
                good: plain,
                bad: plain.add_modifier(Modifier::BOLD),
                warn: plain,
                accent: plain.add_modifier(Modifier::UNDERLINED),
                classes: [Color::Reset; CLASSES],
                parts: [Color::Reset; PARTS],
            },
        }
    }
}

impl Theme {
    /// Whether letters have to do.
    pub fn is_mono(&self) -> bool {
        self.palette == Palette::Mono
    }

    /// Sign and style of a class of memory.
    pub fn class(&self, class: usize) -> (char, Style) {
        let glyph = if self.is_mono() { CLASS_NAMES[class].1 } else { '█' };
        (glyph, Style::new().fg(self.classes[class]))
    }

    /// Style of work on a timeline. Neighbouring microbatches differ in lightness.
    pub fn work(&self, what: What) -> Style {
        if self.is_mono() {
            return Style::new();
        }
        let code = match what {
            What::Pass { pass, microbatch, .. } => {
                let pair = match pass {
                    Pass::F => [25, 67],
                    Pass::B => [130, 173],
                    Pass::W => [28, 71],
                    Pass::BW => [124, 167],
                    Pass::R => [238, 242],
                };
                pair[microbatch as usize % 2]
            }
            What::Communication => 30,
            What::Optimizer => 96,
        };
        Style::new().bg(Color::Indexed(code)).fg(Color::Indexed(231))
    }

    /// Style of a cell of a map, from cold (0) to hot (1).
    pub fn heat(&self, share: f64) -> Style {
        let (ramp, text): ([u8; 8], u8) = match self.palette {
            Palette::Dark => ([52, 88, 94, 136, 100, 64, 28, 22], 231),
            Palette::Light => ([217, 223, 229, 228, 192, 156, 120, 114], 16),
            Palette::Mono => return Style::new(),
        };
        let step = (share.clamp(0.0, 1.0) * (ramp.len() - 1) as f64).round() as usize;
        Style::new().bg(Color::Indexed(ramp[step])).fg(Color::Indexed(text))
    }

    /// Sign and style of a kind of a rank's time.
    pub fn kind(&self, kind: usize) -> (char, Style) {
        if self.is_mono() {
            return (KIND_NAMES[kind].1, Style::new());
        }
        const COLOURS: [u8; KINDS] = [67, 167, 242, 96, 30, 0];
        match COLOURS[kind] {
            0 => ('·', self.dim),
            code => ('█', Style::new().fg(Color::Indexed(code))),
        }
    }

    /// Sign and style of a part of an iteration.
    pub fn part(&self, part: usize) -> (char, Style) {
        let glyph = if self.is_mono() { PART_NAMES[part].1 } else { '█' };
        (glyph, Style::new().fg(self.parts[part]))
    }
}
