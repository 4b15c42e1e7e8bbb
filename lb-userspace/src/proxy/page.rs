//! Pages of a service's own for what the desk has to say: HTML with gaps for the words.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use tracing::error;

use super::{orders::Files, voice::Words};
use crate::model;

/// Longest page, bytes.
const LONGEST: usize = 256 << 10;

/// A file is no page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// It is empty.
    #[error("there is nothing in it")]
    Empty,
    /// It is long.
    #[error("it is longer than 256 KiB")]
    TooLong,
    /// A gap has no end.
    #[error("line {0}: there is no }}}} to {{{{")]
    Open(usize),
    /// Nothing belongs into a gap.
    #[error("line {0}: nothing is known for {{{{{1}}}}}")]
    Unknown(usize, String),
}

/// A page.
#[derive(Debug, PartialEq, Eq)]
pub struct Page(Vec<Piece>);

#[derive(Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Status,
    Reason,
    Title,
    Words,
    RetryAfter,
    RequestId,
}

impl Page {
    /// Reads a page: `{{status}}`, `{{reason}}`, `{{title}}`, `{{text}}`, `{{retry_after}}` (seconds) and
    /// `{{request_id}}` are filled in.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, PageError> {
        if text.len() > LONGEST {
            return Err(PageError::TooLong);
        }
        if text.trim().is_empty() {
            return Err(PageError::Empty);
        }
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((before, behind)) = rest.split_once("{{") {
            let line = || text[..text.len() - behind.len()].matches('\n').count() + 1;
            let (gap, after) = behind.split_once("}}").ok_or_else(|| PageError::Open(line()))?;
            pieces.push(Piece::Text(before.to_owned()));
            pieces.push(match gap.trim() {
                "status" => Piece::Status,
                "reason" => Piece::Reason,
                "title" => Piece::Title,
                "text" => Piece::Words,
                "retry_after" => Piece::RetryAfter,
                "request_id" => Piece::RequestId,
                other => return Err(PageError::Unknown(line(), other.chars().take(40).collect())),
            });
            rest = after;
        }
        pieces.push(Piece::Text(rest.to_owned()));
        Ok(Self(pieces))
    }

    /// The page with these words, for a request of this number.
    pub fn fill(&self, words: &Words, id: &str) -> String {
        let fill = |piece: &Piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Status => words.status.to_string(),
            Piece::Reason => words.reason.to_owned(),
            Piece::Title => escape(words.title),
            Piece::Words => escape(&words.text),
            Piece::RetryAfter => words.retry_after_seconds().map_or(String::new(), |after| after.to_string()),
            Piece::RequestId => id.to_owned(),
        };
        self.0.iter().map(fill).collect()
    }
}

/// A text as HTML has it, in an attribute too.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The pages of a service.
#[derive(Debug, Default)]
pub struct Pages {
    by_status: BTreeMap<u16, Arc<Page>>,
    otherwise: Option<Arc<Page>>,
}

impl Pages {
    /// As the document names them, by their files.
    pub fn new(named: &model::desk::Pages, files: &Files) -> Self {
        let page = |path: &Path| {
            let page = files.get(path).map(|text| Page::parse(text.expose()))?;
            // The daemon has tried it; if it is unfit all the same, there is still the desk's own.
            page.map_err(|why| error!("{} cannot be used: {why}", path.display())).ok().map(Arc::new)
        };
        let by_status = named.by_status.iter().filter_map(|(&status, path)| Some((status, page(path)?)));
        Self { by_status: by_status.collect(), otherwise: named.otherwise.as_deref().and_then(page) }
    }

    /// The one for an answer.
    pub fn of(&self, status: u16) -> Option<&Page> {
        self.by_status.get(&status).or(self.otherwise.as_ref()).map(Arc::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::{orders::Secret, voice::Trouble};

    #[test]
    fn gaps_are_filled_and_nothing_else_is_known() {
        let page =
            "<h1>{{title}}</h1>\n{{ text }} {{status}} {{reason}} {{retry_after}} {{request_id}}{ } }}";
        let page = Page::parse(page).unwrap();
        let filled = page.fill(&Trouble::Closed.words(), "0011");
        assert!(
            filled.starts_with("<h1>This room is closed for the moment</h1>\nNone of the servers"),
            "{filled}"
        );
        assert!(filled.ends_with(" 503 no_backend 5 0011{ } }}"), "{filled}");
        let methods = page.fill(&Trouble::Method("GET, A'&B".into()).words(), "1");
        assert!(methods.contains("GET, A&#39;&amp;B only. 405 method  1"), "{methods}");
        let why = |text: &str| Page::parse(text).unwrap_err().to_string();
        assert_eq!(why("a\n{{titel}}"), "line 2: nothing is known for {{titel}}");
        assert_eq!(why("{{title}}\n\n{{ x"), "line 3: there is no }} to {{");
        assert_eq!(why(" \n"), "there is nothing in it");
        assert_eq!(Page::parse(&"a".repeat(LONGEST + 1)), Err(PageError::TooLong));
    }

    #[test]
    fn a_page_is_for_its_status_or_for_all_others() {
        let files = ["a", "b"].map(|name| (name.into(), Secret::new(format!("page {name}"))));
        let mut named = model::desk::Pages::default();
        named.by_status.insert(503, "a".into());
        let shown = |named: &_, status| {
            let pages = Pages::new(named, &files.clone().into());
            pages.of(status).map(|page| page.fill(&Trouble::Closed.words(), ""))
        };
        assert_eq!((shown(&named, 503), shown(&named, 404)), (Some("page a".into()), None));
        named.otherwise = Some("b".into());
        assert_eq!((shown(&named, 503), shown(&named, 404)), (Some("page a".into()), Some("page b".into())));
        named.by_status.insert(404, "gone".into());
        assert_eq!(shown(&named, 404), Some("page b".into()));
    }
}
