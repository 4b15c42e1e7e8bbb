//! How many tests passed, read from what the test runners print.

use std::{fmt, ops::AddAssign};

/// How many tests ran, and how it went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// They hold.
    pub passed: usize,
    /// They do not.
    pub failed: usize,
    /// They need what is not there, such as root's rights.
    pub skipped: usize,
}

impl Counts {
    /// Reads one line of a test runner's output; most lines say nothing.
    ///
    /// libtest closes each binary with `test result: ok. 3 passed; 0 failed; 1 ignored; …`, nextest its
    /// run with `Summary [ 1.2s] 10 tests run: 9 passed, 1 failed, 2 skipped`.
    pub fn read(&mut self, line: &str) {
        let line = without_colours(line);
        let line = line.trim();
        if !line.starts_with("test result: ") && !line.starts_with("Summary [") {
            return;
        }
        let words: Vec<&str> =
            line.split([' ', ',', ';', '(', ')']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<usize>() else { continue };
            match pair[1] {
                "passed" => self.passed += number,
                "failed" | "timed" => self.failed += number,
                // Nextest's "skipped" are those that a filter left out, or that are marked so.
                "ignored" => self.skipped += number,
                _ => {}
            }
        }
    }

    /// Takes as skipped what a runner took for passed.
    pub fn skip(&mut self, number: usize) {
        let number = number.min(self.passed);
        self.passed -= number;
        self.skipped += number;
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tests: {} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// The text without the terminal's colour sequences (ECMA-48 SGR: `ESC [ … m`).
fn without_colours(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once('m').map_or("", |(_, rest)| rest));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::Counts;

    fn read(lines: &[&str]) -> Counts {
        let mut counts = Counts::default();
        lines.iter().for_each(|line| counts.read(line));
        counts
    }

    #[test]
    fn libtest_is_summed_over_its_binaries() {
        let counts = read(&[
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test a ... ok",
            "test result: FAILED. 2 passed; 4 failed; 0 ignored; 0 measured; 7 filtered out; finished in 0.00s",
        ]);
        assert_eq!(counts, Counts { passed: 5, failed: 4, skipped: 1 });
    }

    #[test]
    fn nextest_in_colour_is_read() {
        let counts = read(&[
            "\u{1b}[32;1m     Summary\u{1b}[0m [   0.004s] \u{1b}[1m12\u{1b}[0m tests run: \u{1b}[1m9\u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m, \u{1b}[1m2\u{1b}[0m failed, \u{1b}[1m1\u{1b}[0m timed out, 3 skipped",
        ]);
        assert_eq!(counts, Counts { passed: 9, failed: 3, skipped: 0 });
    }

    #[test]
    fn skipped_ones_do_not_count_as_passed() {
        let mut counts = Counts { passed: 5, failed: 0, skipped: 0 };
        counts.skip(2);
        assert_eq!(counts.to_string(), "tests: 3 passed, 0 failed, 2 skipped");
    }
}
