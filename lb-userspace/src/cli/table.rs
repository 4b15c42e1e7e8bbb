//! Tables for people: aligned columns, colours only where a person looks.

use std::{
    fmt::Write,
    io::{IsTerminal, stdout},
};

/// Rows under a heading. Widths fit the contents.
pub(super) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// A cell.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    text: String,
    align: Align,
    tone: Tone,
}

#[derive(Clone, Copy, Debug)]
enum Align {
    Left,
    Right,
}

/// How a text is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// As it is.
    Plain,
    /// All is well.
    Good,
    /// Worth a look.
    Odd,
    /// Wrong.
    Bad,
    /// Less important.
    Faint,
}

impl Cell {
    /// Text, to the left.
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), align: Align::Left, tone: Tone::Plain }
    }

    /// A number, to the right.
    #[expect(clippy::needless_pass_by_value, reason = "callers have numbers, or fresh text")]
    pub(super) fn number(number: impl ToString) -> Self {
        Self { text: number.to_string(), align: Align::Right, tone: Tone::Plain }
    }

    /// The same in another tone.
    pub(super) fn tone(self, tone: Tone) -> Self {
        Self { tone, ..self }
    }
}

impl Table {
    /// An empty table.
    pub(super) fn new(heading: &[&'static str]) -> Self {
        Self { heading: heading.to_vec(), rows: Vec::new() }
    }

    /// Adds a row: a cell for each column.
    pub(super) fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.heading.len());
        self.rows.push(cells);
    }

    /// The whole table, a line a row; with colours only if asked for.
    pub(super) fn render(&self, colours: bool) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            let widest = cells.map(|cell| cell.text.chars().count()).max().unwrap_or(0);
            widest.max(self.heading[column].chars().count())
        };
        let widths: Vec<_> = (0..self.heading.len()).map(width).collect();
        let mut out = String::new();
        let align = |column: usize| self.rows.first().map_or(Align::Left, |row| row[column].align);
        let heading: Vec<_> = self
            .heading
            .iter()
            .enumerate()
            .map(|(column, name)| Cell { text: (*name).into(), align: align(column), tone: Tone::Faint })
            .collect();
        for row in std::iter::once(&heading).chain(&self.rows) {
            let mut line = String::new();
            for (cell, &width) in row.iter().zip(&widths) {
                let space = " ".repeat(width.saturating_sub(cell.text.chars().count()));
                let text = paint(&cell.text, cell.tone, colours);
                // Writing to a string cannot fail.
                _ = match cell.align {
                    Align::Left => write!(line, "{text}{space}  "),
                    Align::Right => write!(line, "{space}{text}  "),
                };
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

/// Whether standard output is a terminal that wants colours (https://no-color.org).
pub(super) fn colours() -> bool {
    stdout().is_terminal() && wanted()
}

/// Whether the person wants colours where they can be seen.
pub(super) fn wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A text in its tone.
pub(super) fn paint(text: &str, tone: Tone, colours: bool) -> String {
    let code = match tone {
        _ if !colours => return text.to_owned(),
        Tone::Plain => return text.to_owned(),
        Tone::Good => 32,
        Tone::Odd => 33,
        Tone::Bad => 31,
        Tone::Faint => 2,
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_numbers_are_to_the_right() {
        let mut table = Table::new(&["NAME", "N"]);
        table.row(vec![Cell::text("büro"), Cell::number(5)]);
        table.row(vec![Cell::text("a longer one"), Cell::number(1234).tone(Tone::Bad)]);
        assert_eq!(table.render(false), "NAME             N\nbüro             5\na longer one  1234\n");
        assert!(table.render(true).contains("\x1b[31m1234\x1b[0m"));
        let mut table = Table::new(&["A", "N"]);
        table.row(vec![Cell::text("büro"), Cell::number(5)]);
        assert_eq!(table.render(false), "A     N\nbüro  5\n");
    }

    #[test]
    fn a_table_without_rows_is_its_heading() {
        assert_eq!(Table::new(&["A", "B"]).render(false), "A  B\n");
    }
}
