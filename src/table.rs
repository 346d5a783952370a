//! Aligned tables of text for the terminal.

use crate::screen::{Screen, Style};

pub use paceline_sim::units::{show_percent, show_seconds};

/// A table: the first row is the header; numbers align right, words left.
#[derive(Debug, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    styles: Vec<Option<Style>>,
}

impl Table {
    /// A table with these columns.
    pub fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Table {
        Table { header: header.into_iter().map(Into::into).collect(), rows: Vec::new(), styles: Vec::new() }
    }

    /// Adds a row.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.styled(None, cells);
    }

    /// Adds a row in a style.
    pub fn styled<S: Into<String>>(&mut self, style: Option<Style>, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
        self.styles.push(style);
    }

    /// The lines of the table.
    pub fn lines(&self, screen: &Screen) -> Vec<String> {
        let columns = self.header.len();
        let width = |c: usize| {
            self.rows
                .iter()
                .chain([&self.header])
                .filter_map(|r| r.get(c))
                .map(|s| s.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let numeric: Vec<bool> = (0..columns)
            .map(|c| self.rows.iter().filter_map(|r| r.get(c)).all(|s| s.is_empty() || looks_numeric(s)))
            .collect();
        let render = |cells: &[String]| {
            let parts: Vec<String> = cells
                .iter()
                .enumerate()
                .map(|(c, s)| {
                    let pad = " ".repeat(widths[c].saturating_sub(s.chars().count()));
                    if numeric[c] { format!("{pad}{s}") } else { format!("{s}{pad}") }
                })
                .collect();
            format!("  {}", parts.join("  ")).trim_end().to_string()
        };
        let mut lines = vec![screen.style(Style::Bold, render(&self.header))];
        for (cells, style) in self.rows.iter().zip(&self.styles) {
            let line = render(cells);
            lines.push(match style {
                Some(style) => screen.style(*style, line),
                None => line,
            });
        }
        lines
    }

    /// Prints it on standard output.
    pub fn print(&self, screen: &Screen) -> Result<(), crate::failure::Failure> {
        for line in self.lines(screen) {
            screen.line(line)?;
        }
        Ok(())
    }
}

fn looks_numeric(text: &str) -> bool {
    text.chars().next().is_some_and(|c| c.is_ascii_digit() || "+-.~".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::screen::ColorChoice;

    #[test]
    fn columns_align() {
        let screen = Screen::new(false, true, ColorChoice::Never);
        let mut table = Table::new(["name", "time"]);
        table.row(["a", "1.00 ms"]);
        table.row(["long name", "10.0 ms"]);
        assert_eq!(table.lines(&screen), ["  name          time", "  a          1.00 ms", "  long name  10.0 ms"]);
    }
}
