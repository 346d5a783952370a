//! A screen of a terminal, with its colours, as an SVG drawing. Reads what tmux captures: text with SGR sequences (ECMA-48, 8.3.117)
//! and the 256 colours of xterm.

use std::fmt::Write;

/// Size of a cell and of its letters.
const CELL: (f64, f64) = (8.4, 17.0);
const LETTERS: f64 = 14.0;
/// Default colours.
const FRONT: &str = "#e4e4e4";
const BACK: &str = "#16181b";

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Look {
    front: Option<u8>,
    back: Option<u8>,
    bold: bool,
    underlined: bool,
    reversed: bool,
}

impl Look {
    /// Applies the parameters of one SGR sequence.
    fn apply(&mut self, parameters: &str) {
        let mut codes = parameters.split([';', ':']).map(|code| code.parse::<u16>().unwrap_or(0));
        while let Some(code) = codes.next() {
            match code {
                0 => *self = Look::default(),
                1 => self.bold = true,
                4 => self.underlined = true,
                7 => self.reversed = true,
                22 => self.bold = false,
                24 => self.underlined = false,
                27 => self.reversed = false,
                30..=37 => self.front = Some((code - 30) as u8),
                40..=47 => self.back = Some((code - 40) as u8),
                90..=97 => self.front = Some((code - 82) as u8),
                100..=107 => self.back = Some((code - 92) as u8),
                39 => self.front = None,
                49 => self.back = None,
                38 | 48 => {
                    assert_eq!(codes.next(), Some(5), "only indexed colours are drawn");
                    let colour = codes.next().map(|code| code as u8);
                    *(if code == 38 { &mut self.front } else { &mut self.back }) = colour;
                }
                _ => {}
            }
        }
    }

    /// Colours of letters and of what is behind them.
    fn colours(&self) -> (String, Option<String>) {
        let front = self.front.map_or(FRONT.to_owned(), colour);
        let back = self.back.map(colour);
        if self.reversed { (back.unwrap_or(BACK.to_owned()), Some(front)) } else { (front, back) }
    }
}

/// An indexed colour: sixteen named ones, a cube of six levels, and greys.
fn colour(index: u8) -> String {
    const NAMED: [u32; 16] = [
        0x00_0000, 0xcd_0000, 0x00_cd00, 0xcd_cd00, 0x00_00ee, 0xcd_00cd, 0x00_cdcd, 0xe5_e5e5, 0x7f_7f7f, 0xff_0000,
        0x00_ff00, 0xff_ff00, 0x5c_5cff, 0xff_00ff, 0x00_ffff, 0xff_ffff,
    ];
    let rgb = match index {
        0..=15 => NAMED[usize::from(index)],
        16..=231 => {
            let level = |step: u32| if step == 0 { 0 } else { 55 + 40 * step };
            let n = u32::from(index) - 16;
            level(n / 36) << 16 | level(n / 6 % 6) << 8 | level(n % 6)
        }
        232.. => (8 + 10 * (u32::from(index) - 232)) * 0x01_0101,
    };
    format!("#{rgb:06x}")
}

/// Runs of equal looks of each line: first column, text, look.
fn runs(screen: &str) -> Vec<Vec<(usize, String, Look)>> {
    let mut look = Look::default();
    let of_line = |line: &str| {
        let (mut runs, mut column): (Vec<(usize, String, Look)>, usize) = (Vec::new(), 0);
        let mut rest = line;
        while let Some(letter) = rest.chars().next() {
            if let Some(sequence) = rest.strip_prefix("\x1b[")
                && let Some((parameters, after)) = sequence.split_once('m')
            {
                look.apply(parameters);
                rest = after;
                continue;
            }
            rest = &rest[letter.len_utf8()..];
            match runs.last_mut() {
                Some((_, text, before)) if *before == look => text.push(letter),
                _ => runs.push((column, letter.to_string(), look.clone())),
            }
            column += 1;
        }
        runs
    };
    screen.lines().map(of_line).collect()
}

/// The drawing of a captured screen of so many columns.
pub fn drawing(screen: &str, columns: u16) -> String {
    let lines = runs(screen.trim_end_matches('\n'));
    let (width, height) = (f64::from(columns) * CELL.0 + 16.0, lines.len() as f64 * CELL.1 + 16.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"DejaVu Sans Mono, Menlo, Consolas, monospace\" font-size=\"{LETTERS}\">\n<rect width=\"100%\" height=\"100%\" rx=\"6\" fill=\"{BACK}\"/>\n"
    );
    for (row, runs) in lines.iter().enumerate() {
        let top = 8.0 + row as f64 * CELL.1;
        for (column, text, look) in runs {
            let (front, back) = look.colours();
            let (x, wide) = (8.0 + *column as f64 * CELL.0, text.chars().count() as f64 * CELL.0);
            // Writing to a string cannot fail.
            if let Some(back) = back {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{wide:.1}\" height=\"{}\" fill=\"{back}\"/>",
                    CELL.1
                );
            }
            if text.trim().is_empty() {
                continue;
            }
            let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
            let bold = if look.bold { " font-weight=\"bold\"" } else { "" };
            let under = if look.underlined { " text-decoration=\"underline\"" } else { "" };
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" textLength=\"{wide:.1}\" lengthAdjust=\"spacingAndGlyphs\" xml:space=\"preserve\" fill=\"{front}\"{bold}{under}>{escaped}</text>",
                top + 13.0
            );
        }
    }
    svg + "</svg>\n"
}

#[test]
fn colours_are_those_of_xterm_and_looks_end_where_they_are_reset() {
    assert_eq!(
        [16, 21, 114, 231, 232, 245, 255].map(colour).join(" "),
        "#000000 #0000ff #87d787 #ffffff #080808 #8a8a8a #eeeeee"
    );
    let lines = runs("a\x1b[1;38;5;114mbc\x1b[0m<d\n\x1b[7me");
    assert_eq!(
        lines[0].iter().map(|(column, text, _)| (*column, text.as_str())).collect::<Vec<_>>(),
        [(0, "a"), (1, "bc"), (3, "<d")]
    );
    assert!(lines[0][1].2.bold && lines[0][1].2.front == Some(114) && lines[0][2].2 == Look::default());
    assert_eq!(lines[1][0].2.colours(), (BACK.to_owned(), Some(FRONT.to_owned())));
    let svg = drawing("\x1b[48;5;24mx\x1b[0m &", 4);
    assert!(svg.contains("fill=\"#005f87\"") && svg.contains("&amp;") && svg.ends_with("</svg>\n"));
}
