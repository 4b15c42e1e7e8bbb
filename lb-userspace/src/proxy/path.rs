//! Paths of requests, brought into one form before anything is decided by them: what is routed by, what is
//! authorised by and what the backend gets is the same text (RFC 3986 section 6.2.2).
//!
//! What one server would read in one way and the next in another is not put right but refused: a slash or a
//! zero that is hidden behind a percent sign, a backslash, `..;` (a segment with parameters that some servers
//! take off before they look at it), a way out of the root.

/// Why a path is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It does not begin with a slash.
    #[error("the path does not begin with /")]
    Relative,
    /// A percent sign without two hexadecimal digits.
    #[error("a percent sign in the path has no two hexadecimal digits behind it")]
    Percent,
    /// An encoded slash or backslash, or a backslash.
    #[error("the path has a backslash, or an encoded slash")]
    Slash,
    /// A control character, or one that must be encoded.
    #[error("the path has a character that does not belong there")]
    Character,
    /// A dot segment with parameters.
    #[error("the path has dots with parameters for a segment")]
    DotParameters,
    /// It leads out of the root.
    #[error("the path leads out of the root")]
    Outside,
}

/// The path in the form that all decisions are made by: unreserved characters decoded, other escapes in upper
/// case, no `.` and `..` segments, no empty ones but the last.
///
/// # Errors
/// When it can be read in more than one way.
pub fn normalise(path: &str) -> Result<String, PathError> {
    let rest = path.strip_prefix('/').ok_or(PathError::Relative)?;
    let mut segments: Vec<String> = Vec::new();
    // Whether the path ends below the last segment: `/a/`, `/a/.`, `/a/b/..`.
    let mut open = true;
    for segment in rest.split('/') {
        let segment = decode(segment)?;
        match segment.as_str() {
            "" | "." => open = true,
            ".." => {
                segments.pop().ok_or(PathError::Outside)?;
                open = true;
            }
            named => {
                if matches!(named.split(';').next(), Some("." | "..")) {
                    return Err(PathError::DotParameters);
                }
                segments.push(segment);
                open = false;
            }
        }
    }
    let mut whole = String::with_capacity(path.len());
    for segment in &segments {
        whole.push('/');
        whole.push_str(segment);
    }
    if open {
        whole.push('/');
    }
    Ok(whole)
}

/// One segment with its escapes in normal form.
fn decode(segment: &str) -> Result<String, PathError> {
    let mut decoded = String::with_capacity(segment.len());
    let mut bytes = segment.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16).map(|digit| digit as u8);
                let (high, low) = (digit(bytes.next()), digit(bytes.next()));
                let byte = high.zip(low).map(|(high, low)| high << 4 | low).ok_or(PathError::Percent)?;
                match byte {
                    b'/' | b'\\' => return Err(PathError::Slash),
                    0..0x20 | 0x7f => return Err(PathError::Character),
                    _ if is_unreserved(byte) => decoded.push(byte.into()),
                    _ => decoded.push_str(&format!("%{byte:02X}")),
                }
            }
            b'\\' => return Err(PathError::Slash),
            // RFC 3986 section 3.3: pchar.
            b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' | b':' | b'@' => {
                decoded.push(byte.into());
            }
            _ if is_unreserved(byte) => decoded.push(byte.into()),
            _ => return Err(PathError::Character),
        }
    }
    Ok(decoded)
}

/// RFC 3986 section 2.3.
fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// Whether a normalised path is `prefix` or below it. A final slash of the prefix makes no difference.
pub fn is_below(path: &str, prefix: &str) -> bool {
    below(path, prefix).is_some()
}

/// A normalised path with another in place of `prefix`; `None`: it is not below that.
pub fn rewrite(path: &str, prefix: &str, with: &str) -> Option<String> {
    let rest = below(path, prefix)?;
    let with = with.strip_suffix('/').unwrap_or(with);
    Some(if with.is_empty() && rest.is_empty() { "/".to_owned() } else { format!("{with}{rest}") })
}

fn below<'p>(path: &'p str, prefix: &str) -> Option<&'p str> {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_have_one_form() {
        for (path, normal) in [
            ("/", "/"),
            ("/pay", "/pay"),
            ("/pay/", "/pay/"),
            ("//pay///now", "/pay/now"),
            ("/a/./b/../c", "/a/c"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/a/%2e%2e/b", "/b"),
            ("/a/.%2E/b", "/b"),
            ("/%61dmin", "/admin"),
            ("/%7euser", "/~user"),
            ("/a%20b", "/a%20b"),
            ("/a%c3%a9", "/a%C3%A9"),
            ("/%252e%252e/x", "/%252e%252e/x"),
            ("/a;v=1/b", "/a;v=1/b"),
            ("/...", "/..."),
            ("/a:b@c,d", "/a:b@c,d"),
        ] {
            assert_eq!(normalise(path).as_deref(), Ok(normal), "{path}");
        }
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        use PathError::{Character, DotParameters, Outside, Percent, Relative, Slash};
        for (path, why) in [
            ("", Relative),
            ("*", Relative),
            ("pay", Relative),
            ("/x/..%2fadmin", Slash),
            ("/x/..%5Cadmin", Slash),
            ("/x\\..\\admin", Slash),
            ("/..", Outside),
            ("/a/../../b", Outside),
            ("/%2e%2e/etc/passwd", Outside),
            ("/a/..;/admin", DotParameters),
            ("/a/%2e%2e;x=1/admin", DotParameters),
            ("/a/.;/b", DotParameters),
            ("/a%00", Character),
            ("/a%0d%0aSet-Cookie:x", Character),
            ("/a%7f", Character),
            ("/a b", Character),
            ("/a\u{e9}", Character),
            ("/a\"b", Character),
            ("/a?b", Character),
            ("/a%", Percent),
            ("/a%2", Percent),
            ("/a%zz", Percent),
            ("/a%+1", Percent),
        ] {
            assert_eq!(normalise(path), Err(why), "{path}");
        }
    }

    #[test]
    fn prefixes_end_at_the_borders_of_segments() {
        for (path, prefix, bare, other) in [
            ("/pay", "/pay", Some("/"), "/v2/cash"),
            ("/pay/now", "/pay", Some("/now"), "/v2/cash/now"),
            ("/pay/now", "/pay/", Some("/now"), "/v2/cash/now"),
            ("/pay/", "/pay", Some("/"), "/v2/cash/"),
            ("/pay", "/pay/", Some("/"), "/v2/cash"),
            ("/payments", "/pay", None, ""),
            ("/Pay", "/pay", None, ""),
            ("/anything", "/", Some("/anything"), "/v2/cash/anything"),
            ("/", "/", Some("/"), "/v2/cash/"),
        ] {
            assert_eq!(rewrite(path, prefix, "/").as_deref(), bare, "{path} {prefix}");
            for with in ["/v2/cash", "/v2/cash/"] {
                let found = rewrite(path, prefix, with);
                assert_eq!(found.as_deref(), bare.map(|_| other), "{path} {prefix} {with}");
            }
            assert_eq!(is_below(path, prefix), bare.is_some(), "{path} {prefix}");
        }
    }

    proptest! {
        /// What comes out has no dot segments, hides no slash, and is what comes out of itself.
        #[test]
        fn the_form_is_final(path in "/([a-c./;%\\\\]|%2e|%2E|%2f|%5c|%25|%41|%00|%c3){0,16}") {
            if let Ok(normal) = normalise(&path) {
                prop_assert_eq!(normalise(&normal), Ok(normal.clone()));
                prop_assert!(normal.starts_with('/') && !normal.contains("//") && !normal.contains('\\'));
                prop_assert!(normal.split('/').all(|segment| segment != "." && segment != ".."));
                let upper = normal.to_uppercase();
                prop_assert!(!["%2F", "%5C", "%2E", "%00"].iter().any(|hidden| upper.contains(hidden)));
            }
        }

        /// Whatever comes, there is an answer.
        #[test]
        fn no_text_crashes(path in "\\PC{0,40}") {
            _ = normalise(&path);
        }
    }
}
