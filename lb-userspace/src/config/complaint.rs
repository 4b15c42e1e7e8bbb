//! What is wrong with a document, where, and how to mend it.

use std::{collections::BTreeMap, fmt, net::IpAddr, ops::Range, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::model::BackendAddress;

/// Something wrong with a document.
///
/// Shown as `LINE:COLUMN: error: …` with the line itself and a caret below the place, so that whoever
/// prints it can put the file's name and a colon before it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Complaint {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The line's text.
    pub excerpt: String,
    /// How many characters from `column` on are meant, at least 1.
    pub width: usize,
    /// Whether the document is refused for it.
    pub severity: Severity,
    /// What is wrong.
    pub message: String,
    /// How to mend it.
    pub remedy: String,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The document is refused.
    Error,
    /// The document is accepted.
    Warning,
}

impl Complaint {
    /// The same, with the name of the file that the document is in before it.
    pub fn of_file(&self, file: impl fmt::Display) -> String {
        format!("{file}:{self}")
    }
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, severity, message, .. } = self;
        write!(f, "{line}:{column}: {severity}: {message}")?;
        let margin = line.to_string().len();
        write!(f, "\n {line} | {}", self.excerpt)?;
        // Tabs stay tabs below a tab, so that the caret stands where the mistake is.
        let indent = self.excerpt.chars().take(column - 1);
        let indent: String = indent.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
        write!(f, "\n {:margin$} | {indent}{}", "", "^".repeat(self.width))?;
        write!(f, "\n {:margin$} = {}", "", self.remedy)
    }
}

/// All that is wrong with a document, in the order of its lines; at least one error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{}", self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
pub struct Complaints(pub Vec<Complaint>);

impl Complaints {
    /// Why a document is refused, of all that is odd about it, in the order of its lines: most of that follows from the
    /// mistakes.
    pub fn errors_of(mut all: Vec<Complaint>) -> Self {
        all.retain(|complaint| complaint.severity == Severity::Error);
        all.sort();
        all.dedup();
        Self(all)
    }

    /// All of them, each with the name of the file that the document is in before it.
    pub fn of_file(&self, file: &Path) -> String {
        let lines: Vec<_> = self.0.iter().map(|complaint| complaint.of_file(file.display())).collect();
        lines.join("\n")
    }
}

/// Where things are in a document, so that what turns out later (a missing interface, a route) is
/// reported in the right place too.
#[derive(Clone, Debug)]
pub struct Places {
    text: Arc<str>,
    lines: Arc<Lines>,
    spans: BTreeMap<Thing, Range<usize>>,
}

/// What has a place.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Thing {
    Interface(String),
    Source(IpAddr),
    Metrics,
    Pool(String),
    Backend(String, BackendAddress),
    Listen(String),
    PoolOf(String),
    PoolOfRoute(String, usize),
    HostOfRoute(String, usize),
    Passthrough(String, usize),
    Certificate(String, usize),
    Way(String, usize, usize),
    RingSize(String),
    Speech(String),
    Crowd(String),
    Ejection(String),
    FileOf(String, String),
}

impl Places {
    pub(super) fn new(text: &str, lines: Arc<Lines>) -> Self {
        Self { text: text.into(), lines, spans: BTreeMap::new() }
    }

    pub(super) fn note(&mut self, thing: Thing, span: Range<usize>) {
        self.spans.insert(thing, span);
    }

    /// Where an interface is named.
    pub fn interface(&self, name: &str) -> Place<'_> {
        self.of(&Thing::Interface(name.to_owned()))
    }

    /// Where a source address is named.
    pub fn source(&self, address: IpAddr) -> Place<'_> {
        self.of(&Thing::Source(address))
    }

    /// Where the address for metrics is.
    pub fn metrics(&self) -> Place<'_> {
        self.of(&Thing::Metrics)
    }

    /// Where a pool is named.
    pub fn pool(&self, name: &str) -> Place<'_> {
        self.of(&Thing::Pool(name.to_owned()))
    }

    /// Where a backend's address is.
    pub fn backend(&self, pool: &str, address: BackendAddress) -> Place<'_> {
        self.of(&Thing::Backend(pool.to_owned(), address))
    }

    /// Where a pool says how the desk is to speak with it.
    pub fn speech(&self, pool: &str) -> Place<'_> {
        self.of(&Thing::Speech(pool.to_owned()))
    }

    /// Where a pool says how many requests may be under way.
    pub fn crowd(&self, pool: &str) -> Place<'_> {
        self.of(&Thing::Crowd(pool.to_owned()))
    }

    /// Where a pool says when a server gets no requests for a while.
    pub fn ejection(&self, pool: &str) -> Place<'_> {
        self.of(&Thing::Ejection(pool.to_owned()))
    }

    /// Where a service says what it listens on.
    pub fn listen(&self, service: &str) -> Place<'_> {
        self.of(&Thing::Listen(service.to_owned()))
    }

    /// Where a service names its pool.
    pub fn pool_of(&self, service: &str) -> Place<'_> {
        self.of(&Thing::PoolOf(service.to_owned()))
    }

    /// Where a route of a service, by its number, names its pool.
    pub fn pool_of_route(&self, service: &str, route: usize) -> Place<'_> {
        self.of(&Thing::PoolOfRoute(service.to_owned(), route))
    }

    /// Where a route of a service, by its number, names its host.
    pub fn host_of_route(&self, service: &str, route: usize) -> Place<'_> {
        self.of(&Thing::HostOfRoute(service.to_owned(), route))
    }

    /// Where a service names the pool that connections are handed to, by number.
    pub fn passthrough(&self, service: &str, number: usize) -> Place<'_> {
        self.of(&Thing::Passthrough(service.to_owned(), number))
    }

    /// Where a service names a certificate, by its number.
    pub fn certificate(&self, service: &str, number: usize) -> Place<'_> {
        self.of(&Thing::Certificate(service.to_owned(), number))
    }

    /// Where a route of a service, by its number, names a way to say who one is, by its number.
    pub fn way(&self, service: &str, route: usize, way: usize) -> Place<'_> {
        self.of(&Thing::Way(service.to_owned(), route, way))
    }

    /// Where a service names a file that is there for this: `ca`, `crl`, `page 503`.
    pub fn file_of(&self, service: &str, purpose: &str) -> Place<'_> {
        self.of(&Thing::FileOf(service.to_owned(), purpose.to_owned()))
    }

    /// Where a service says the size of its ring.
    pub fn ring_size(&self, service: &str) -> Place<'_> {
        self.of(&Thing::RingSize(service.to_owned()))
    }

    pub(super) fn has_pool(&self, name: &str) -> bool {
        self.spans.contains_key(&Thing::Pool(name.to_owned()))
    }

    /// The beginning of the document when it does not name the thing.
    fn of(&self, thing: &Thing) -> Place<'_> {
        let span = self.spans.get(thing).cloned().unwrap_or(0..0);
        Place { text: &self.text, lines: &self.lines, span }
    }
}

/// Where the lines of a text begin: a document may have a hundred thousand, and as many complaints.
#[derive(Clone, Debug)]
pub(super) struct Lines(Vec<usize>);

impl Lines {
    pub(super) fn of(text: &str) -> Self {
        Self(std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect())
    }

    /// The number, from 1, of the line that a byte is in, and where it begins.
    fn line(&self, at: usize) -> (usize, usize) {
        let number = self.0.partition_point(|&start| start <= at);
        (number, self.0[number - 1])
    }
}

/// A place in a document.
#[derive(Clone, Debug)]
pub struct Place<'t> {
    text: &'t str,
    lines: &'t Lines,
    span: Range<usize>,
}

impl<'t> Place<'t> {
    pub(super) fn new(text: &'t str, lines: &'t Lines, span: Range<usize>) -> Self {
        Self { text, lines, span }
    }

    /// A complaint for which the document is refused.
    pub fn error(&self, message: impl Into<String>, remedy: impl Into<String>) -> Complaint {
        self.complain(Severity::Error, message.into(), remedy.into())
    }

    /// A complaint with which the document is accepted.
    pub fn warning(&self, message: impl Into<String>, remedy: impl Into<String>) -> Complaint {
        self.complain(Severity::Warning, message.into(), remedy.into())
    }

    fn complain(&self, severity: Severity, message: String, remedy: String) -> Complaint {
        let start = floor(self.text, self.span.start);
        let (line, line_start) = self.lines.line(start);
        let line_end = self.text[start..].find('\n').map_or(self.text.len(), |length| start + length);
        let end = floor(self.text, self.span.end).clamp(start, line_end);
        Complaint {
            line,
            column: self.text[line_start..start].chars().count() + 1,
            excerpt: self.text[line_start..line_end].trim_end().to_owned(),
            width: self.text[start..end].chars().count().max(1),
            severity,
            message,
            remedy,
        }
    }
}

/// The last character boundary up to `offset`.
fn floor(text: &str, offset: usize) -> usize {
    (0..=offset.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_shows_the_line_and_points_at_the_mistake() {
        let text = "a = 1\n\tbüro = \"wbe\"\n";
        let start = text.find("\"wbe\"").unwrap();
        let shown = Place::new(text, &Lines::of(text), start..start + 5)
            .error("no pool \"wbe\"", "did you mean \"web\"?");
        assert_eq!((shown.line, shown.column, shown.width), (2, 9, 5));
        assert_eq!(
            shown.to_string(),
            "2:9: error: no pool \"wbe\"\n 2 | \tbüro = \"wbe\"\n   | \t       ^^^^^\n   = did you mean \"web\"?"
        );
    }

    #[test]
    fn a_place_that_is_unknown_is_the_beginning() {
        let places = Places::new("x = 1", Lines::of("x = 1").into());
        let complaint = places.interface("eth9").warning("m", "r");
        assert_eq!((complaint.line, complaint.column, complaint.width), (1, 1, 1));
        assert_eq!(complaint.severity, Severity::Warning);
    }

    #[test]
    fn a_span_over_several_lines_ends_with_the_first() {
        let text = "[a]\nb = [\n 1,\n]\n";
        let complaint = Place::new(text, &Lines::of(text), 8..15).error("m", "r");
        assert_eq!((complaint.line, complaint.column, complaint.width), (2, 5, 1));
    }
}
