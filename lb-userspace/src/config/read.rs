//! Reads values out of a parsed document, noting every mistake on the way instead of stopping at the first.

use std::{
    fmt::Display,
    ops::{Range, RangeInclusive},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use toml::de::{DeTable, DeValue};

use super::complaint::{Complaint, Lines, Place, Places};

/// A document's text and what is wrong with it so far.
pub(super) struct Sink<'t> {
    text: &'t str,
    lines: Arc<Lines>,
    pub(super) complaints: Vec<Complaint>,
    /// Values that are to be seen nowhere.
    secrets: Vec<&'t str>,
}

impl<'t> Sink<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, lines: Lines::of(text).into(), complaints: Vec::new(), secrets: Vec::new() }
    }

    /// The same text, with nothing noted yet.
    pub(super) fn places(&self) -> Places {
        Places::new(self.text, Arc::clone(&self.lines))
    }

    fn place(&self, span: &Range<usize>) -> Place<'_> {
        Place::new(self.text, &self.lines, span.clone())
    }

    pub(super) fn error(
        &mut self,
        span: &Range<usize>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.complaints.push(self.place(span).error(message, remedy));
    }

    /// The line of a place, from 1.
    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        self.place(span).error("", "").line
    }

    /// What stands there is not to be shown with any complaint.
    pub(super) fn hide(&mut self, span: &Range<usize>) {
        self.secrets.extend(self.text.get(span.clone()).filter(|secret| !secret.is_empty()));
    }

    /// All complaints, with nothing in them that is to be hidden.
    pub(super) fn into_complaints(self) -> Vec<Complaint> {
        let Self { mut complaints, secrets, .. } = self;
        for complaint in &mut complaints {
            for secret in &secrets {
                let stars = "*".repeat(secret.chars().count());
                complaint.excerpt = complaint.excerpt.replace(secret, &stars);
            }
        }
        complaints
    }

    pub(super) fn warning(
        &mut self,
        span: &Range<usize>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.complaints.push(self.place(span).warning(message, remedy));
    }
}

/// A value, where it is, and what it is called in complaints.
#[derive(Clone)]
pub(super) struct Node<'d> {
    value: &'d DeValue<'d>,
    pub(super) span: Range<usize>,
    name: String,
}

impl<'d> Node<'d> {
    pub(super) fn string(&self, sink: &mut Sink<'_>) -> Option<&'d str> {
        match self.value {
            DeValue::String(text) => Some(text),
            _ => self.wrong_type(sink, "a text in quotes"),
        }
    }

    pub(super) fn boolean(&self, sink: &mut Sink<'_>) -> Option<bool> {
        match self.value {
            DeValue::Boolean(value) => Some(*value),
            _ => self.wrong_type(sink, "true or false"),
        }
    }

    pub(super) fn integer(&self, sink: &mut Sink<'_>, range: RangeInclusive<u32>) -> Option<u32> {
        let (low, high) = (range.start(), range.end());
        let DeValue::Integer(digits) = self.value else {
            return self.wrong_type(sink, &format!("a whole number from {low} to {high}"));
        };
        let number = i128::from_str_radix(digits.as_str(), digits.radix()).ok();
        let number = number.and_then(|n| u32::try_from(n).ok()).filter(|n| range.contains(n));
        if number.is_none() {
            let Self { span, name, .. } = self;
            sink.error(
                span,
                format!("{name} is out of range"),
                format!("write a whole number from {low} to {high}"),
            );
        }
        number
    }

    pub(super) fn fraction(&self, sink: &mut Sink<'_>, range: RangeInclusive<f64>) -> Option<f64> {
        let number = match self.value {
            DeValue::Float(digits) => digits.as_str().parse::<f64>().ok(),
            DeValue::Integer(digits) => digits.as_str().parse::<f64>().ok(),
            _ => None,
        };
        let number = number.filter(|n| range.contains(n));
        if number.is_none() {
            let (low, high) = (range.start(), range.end());
            let Self { span, name, .. } = self;
            sink.error(
                span,
                format!("{name} is out of range"),
                format!("write a number from {low} to {high}"),
            );
        }
        number
    }

    /// A text that `T` can be read from; what `T` says is the remedy.
    pub(super) fn parsed<T: FromStr<Err: Display>>(&self, sink: &mut Sink<'_>) -> Option<T> {
        let text = self.string(sink)?;
        text.parse().map_err(|why| self.refuse(sink, why)).ok()
    }

    /// The name of a file, such as `example`.
    pub(super) fn file(&self, sink: &mut Sink<'_>, example: &str) -> Option<PathBuf> {
        let name = self.string(sink)?;
        if name.is_empty() {
            self.refuse(
                sink,
                format!("write the name of a file, which is beside the document, or a whole path: {example}"),
            );
            return None;
        }
        Some(name.into())
    }

    /// A length of time, not zero.
    pub(super) fn duration(&self, sink: &mut Sink<'_>) -> Option<Duration> {
        let text = match self.value {
            DeValue::Integer(digits) => {
                let remedy = format!("say the unit: \"{0}s\" or \"{0}ms\"", digits.as_str());
                sink.error(&self.span, format!("{} has no unit", self.name), remedy);
                return None;
            }
            _ => self.string(sink)?,
        };
        parse_duration(text).map_err(|why| self.refuse(sink, why)).ok()
    }

    /// One of these words.
    pub(super) fn choice<T: Copy>(&self, sink: &mut Sink<'_>, words: &[(&str, T)]) -> Option<T> {
        let text = self.string(sink)?;
        let found = words.iter().find(|(word, _)| *word == text).map(|&(_, value)| value);
        if found.is_none() {
            let remedy = suggest(text, words.iter().map(|&(word, _)| word));
            sink.error(&self.span, format!("{} cannot be \"{text}\"", self.name), remedy);
        }
        found
    }

    pub(super) fn array(&self, sink: &mut Sink<'_>) -> Option<Vec<Self>> {
        match self.value {
            DeValue::Array(items) => Some(
                items
                    .iter()
                    .map(|item| Self { value: item.get_ref(), span: item.span(), name: self.name.clone() })
                    .collect(),
            ),
            _ => self.wrong_type(sink, "a list in [ ]"),
        }
    }

    /// Each item of a list by `read`; those that are wrong are left out.
    pub(super) fn list<T>(
        &self,
        sink: &mut Sink<'_>,
        mut read: impl FnMut(&Self, &mut Sink<'_>) -> Option<T>,
    ) -> Vec<(T, Range<usize>)> {
        let items = self.array(sink).unwrap_or_default();
        items.iter().filter_map(|item| Some((read(item, sink)?, item.span.clone()))).collect()
    }

    pub(super) fn table(&self, sink: &mut Sink<'_>) -> Option<Fields<'d>> {
        match self.value {
            DeValue::Table(table) => Some(Fields::new(table, self.span.clone(), self.name.clone())),
            _ => self.wrong_type(sink, "a table: { key = value, … }"),
        }
    }

    pub(super) fn is_table(&self) -> bool {
        self.value.is_table()
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn value(&self) -> &'d DeValue<'d> {
        self.value
    }

    pub(super) fn refuse(&self, sink: &mut Sink<'_>, remedy: impl Display) {
        let shown = match self.value {
            DeValue::String(text) => format!(" \"{text}\""),
            _ => String::new(),
        };
        sink.error(&self.span, format!("{}{shown} is not understood", self.name), remedy.to_string());
    }

    pub(super) fn wrong_type<T>(&self, sink: &mut Sink<'_>, wanted: &str) -> Option<T> {
        let message = format!("{} is {}", self.name, with_article(self.value.type_str()));
        sink.error(&self.span, message, format!("write {wanted}"));
        None
    }
}

/// A table whose keys are asked for one by one; those never asked for are mistakes.
pub(super) struct Fields<'d> {
    table: &'d DeTable<'d>,
    pub(super) span: Range<usize>,
    name: String,
    known: Vec<&'static str>,
    later: Vec<(&'static str, &'static str)>,
}

impl<'d> Fields<'d> {
    pub(super) fn new(table: &'d DeTable<'d>, span: Range<usize>, name: String) -> Self {
        Self { table, span, name, known: Vec::new(), later: Vec::new() }
    }

    pub(super) fn get(&mut self, key: &'static str) -> Option<Node<'d>> {
        self.known.push(key);
        let value = self.table.get(key)?;
        Some(Node { value: value.get_ref(), span: value.span(), name: key.to_owned() })
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// What `read` makes of the value; `None` when it is absent, or wrong and noted.
    pub(super) fn read<T>(
        &mut self,
        sink: &mut Sink<'_>,
        key: &'static str,
        read: impl FnOnce(&Node<'d>, &mut Sink<'_>) -> Option<T>,
    ) -> Option<T> {
        read(&self.get(key)?, sink)
    }

    /// The value; its absence is noted with `example`.
    pub(super) fn require(
        &mut self,
        sink: &mut Sink<'_>,
        key: &'static str,
        example: &str,
    ) -> Option<Node<'d>> {
        let node = self.get(key);
        if node.is_none() {
            sink.error(&self.span, format!("{} has no {key}", self.name), format!("add {key} = {example}"));
        }
        node
    }

    /// Keys that a later version knows.
    pub(super) fn later(&mut self, keys: &[(&'static str, &'static str)]) {
        self.later.extend_from_slice(keys);
    }

    /// The keys as names of a user's choosing, with their tables.
    pub(super) fn named(&self, kind: &str) -> Vec<(&'d str, Range<usize>, Node<'d>)> {
        let named = |(key, value): (&'d toml::Spanned<_>, &'d toml::Spanned<DeValue<'d>>)| {
            let key_text: &'d toml::de::DeString<'d> = key.get_ref();
            let name = format!("{kind} \"{key_text}\"");
            // The key, not the value, is the place: a table made of several parts has no one span.
            (key_text.as_ref(), key.span(), Node { value: value.get_ref(), span: key.span(), name })
        };
        self.table.iter().map(named).collect()
    }

    /// Complains about every key that was not asked for.
    pub(super) fn finish(self, sink: &mut Sink<'_>) {
        for key in self.table.keys() {
            let text = key.get_ref().as_ref();
            if self.known.contains(&text) {
                continue;
            }
            match self.later.iter().find(|(later, _)| *later == text) {
                Some((_, instead)) => {
                    sink.error(&key.span(), format!("{text} is not in this version of Lobby"), *instead);
                }
                None => {
                    let remedy = suggest(text, self.known.iter().copied());
                    sink.error(&key.span(), format!("{} has no key {text}", self.name), remedy);
                }
            }
        }
    }
}

/// The word that may have been meant, if one is near enough.
pub(crate) fn nearest<'w>(text: &str, words: impl Iterator<Item = &'w str>) -> Option<&'w str> {
    let (distance, word) = words.map(|word| (distance(text, word), word)).min()?;
    (distance <= 1 + text.chars().count() / 3).then_some(word)
}

/// A sentence that names the nearest word, or all of them.
pub(super) fn suggest<'w>(text: &str, words: impl Iterator<Item = &'w str> + Clone) -> String {
    if let Some(word) = nearest(text, words.clone()) {
        return format!("did you mean \"{word}\"?");
    }
    let all: Vec<_> = words.map(|word| format!("\"{word}\"")).collect();
    match &all[..] {
        [] => "there is none; remove it".to_owned(),
        [one] => format!("write {one}"),
        _ => format!("choose one of {}", all.join(", ")),
    }
}

/// A length of time: "20s", "2h", "1m 30s", "500ms".
pub(super) fn parse_duration(text: &str) -> Result<Duration, &'static str> {
    const HOW: &str = "write a number and its unit, such as \"500ms\", \"20s\", \"5m\", \"2h\" or \"1d\"";
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(HOW);
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or(HOW)?;
        let number: u64 = rest[..digits].parse().map_err(|_| HOW)?;
        rest = rest[digits..].trim_start();
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let unit_ms: u64 = match &rest[..letters] {
            "ms" => 1,
            "s" | "sec" => 1000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(HOW),
        };
        rest = rest[letters..].trim_start();
        let part = Duration::from_millis(number.checked_mul(unit_ms).ok_or(HOW)?);
        total = total.checked_add(part).ok_or(HOW)?;
    }
    if total.is_zero() {
        return Err("zero would mean at once; write how long, such as \"1s\"");
    }
    if total > Duration::from_secs(365 * 86_400) {
        return Err("that is more than a year (365d), the longest that can be kept");
    }
    Ok(total)
}

/// Least number of characters to insert, remove, replace, or swap with their neighbour.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

fn with_article(kind: &str) -> String {
    let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {kind}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_units() {
        let ms = |text| parse_duration(text).map(|d| d.as_millis());
        assert_eq!(ms("500ms"), Ok(500));
        assert_eq!(ms("20s"), Ok(20_000));
        assert_eq!(ms("2h 4min"), Ok(7_440_000));
        assert_eq!(ms("1d"), Ok(86_400_000));
        for wrong in ["", "20", "s", "20 parsecs", "-1s", "1.5s", "0s", "400d", "99999999999999999999s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_nearest_word_is_suggested() {
        let words = ["backends", "health", "panic"];
        assert_eq!(suggest("bakends", words.into_iter()), "did you mean \"backends\"?");
        assert_eq!(suggest("haelth", words.into_iter()), "did you mean \"health\"?");
        assert_eq!(suggest("xyzzy", words.into_iter()), "choose one of \"backends\", \"health\", \"panic\"");
        assert_eq!(distance("abc", "acb"), 1);
        assert_eq!(distance("", "abc"), 3);
    }
}
