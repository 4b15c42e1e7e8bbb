//! How long certificates hold, and what is to be said of it at a moment. No clock: time is an argument.

use crate::config::edit::datetime;

/// So many days before its end a certificate is worth a warning: what renews them by itself does it earlier.
pub const DAYS_OF_NOTE: u64 = 14;

const SOON: u64 = DAYS_OF_NOTE * DAY;

const DAY: u64 = 24 * 3600;

/// From when to when a certificate holds, both included, in seconds since the epoch (RFC 5280 section 4.1.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first second.
    pub from: u64,
    /// The last.
    pub until: u64,
}

impl Validity {
    /// What is odd about a certificate now, in words that follow its name; as long as it is the same, so are the words.
    pub fn trouble(self, now: u64) -> Option<String> {
        let Self { from, until } = self;
        if now > until {
            Some(format!("has expired, on {}: clients refuse it", datetime(until)))
        } else if now < from {
            Some(format!("is not valid before {}: clients refuse it", datetime(from)))
        } else if until - now <= SOON {
            Some(format!("runs out on {}", datetime(until)))
        } else {
            None
        }
    }

    /// Whole days that are left; negative when it has expired.
    pub fn days_left(self, now: u64) -> i64 {
        let left = i128::from(self.until) - i128::from(now);
        i64::try_from(left.div_euclid(i128::from(DAY))).unwrap_or(i64::MAX)
    }

    /// When it ends (RFC 3339).
    pub fn end(self) -> String {
        datetime(self.until).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-12-01T00:00:00Z.
    const END: u64 = 1_796_083_200;
    const HELD: Validity = Validity { from: END - 90 * DAY, until: END };

    #[test]
    fn a_certificate_is_worth_a_word_before_it_begins_soon_before_it_ends_and_after() {
        for (now, words) in [
            (HELD.from - 1, Some("is not valid before 2026-09-02T00:00:00Z")),
            (HELD.from, None),
            (END - SOON - 1, None),
            (END - SOON, Some("runs out on 2026-12-01T00:00:00Z")),
            (END, Some("runs out on 2026-12-01T00:00:00Z")),
            (END + 1, Some("has expired, on 2026-12-01T00:00:00Z")),
        ] {
            let said = HELD.trouble(now);
            assert_eq!(said.is_some(), words.is_some(), "{now}: {said:?}");
            assert!(said.unwrap_or_default().starts_with(words.unwrap_or_default()), "{now}");
        }
    }

    #[test]
    fn days_are_whole_ones() {
        let at = |now| HELD.days_left(now);
        assert_eq!([at(HELD.from), at(END - DAY), at(END - 1), at(END), at(END + 1)], [90, 1, 0, 0, -1]);
        assert_eq!(Validity { from: 0, until: u64::MAX }.days_left(0), 213_503_982_334_601);
        assert_eq!(HELD.end(), "2026-12-01T00:00:00Z");
    }
}
