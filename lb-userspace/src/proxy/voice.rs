//! The friendly voice: what the desk says when it cannot do what it was asked, in plain words, as a page, as
//! JSON or as text, whichever the client would rather have, or as gRPC has it.

use std::{fmt::Write, time::Duration};

use http::{HeaderMap, HeaderValue, header};

use super::{auth::Refusal, page::escape};

/// Why a request is not answered by a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No server of the pool is fit.
    Closed,
    /// All servers have as much to do as they may, and as many wait as may.
    Full,
    /// All servers of the pool are being taken out.
    Drained,
    /// No connection to a server came about.
    Unreachable,
    /// The server did not show that it is who it should be, or there is nothing to tell by.
    Untrusted,
    /// The server broke off, or answered something that is no HTTP.
    Broken,
    /// The server took too long.
    Slow,
    /// Nothing is served for this host.
    NoHost,
    /// Nothing is served under this path.
    NoPath,
    /// Only these methods, separated by commas.
    Method(String),
    /// The request is not HTTP as it should be.
    Wrong(&'static str),
    /// The body is longer than the desk takes.
    TooLarge,
    /// There are more headers than the desk takes.
    TooMany,
    /// The body stopped coming.
    Stalled,
    /// `Expect` asks for something unknown.
    Expectation,
    /// A version of websockets other than the one that there is.
    WebsocketVersion,
    /// Something that the desk does not do.
    Unsupported(&'static str),
    /// They come more often than they may; when there is room again.
    TooOften(Duration),
    /// All are to show a certificate, and what was shown does not hold any more.
    NoCertificate,
    /// They may not come in by this route.
    Refused(Refusal),
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words {
    /// The status.
    pub status: u16,
    /// The reason in one word or two, for programs.
    pub reason: &'static str,
    /// The heading.
    pub title: &'static str,
    /// What happened, and what to do.
    pub text: String,
    /// When it is worth another try.
    pub retry_after: Option<Duration>,
}

impl Words {
    /// When it is worth another try, in whole seconds, so that nobody comes too early.
    pub fn retry_after_seconds(&self) -> Option<u64> {
        self.retry_after.map(|wait| wait.as_secs() + u64::from(wait.subsec_nanos() > 0))
    }

    /// Status and message as gRPC has them (the first by gRPC's "HTTP to gRPC Status Code Mapping", but for what
    /// it calls unknown; the second in percent encoding, by "gRPC over HTTP2").
    pub fn for_grpc(&self, id: &str) -> (u8, String) {
        let code = match self.status {
            400 | 417 => 13,
            401 => 16,
            403 => 7,
            404 | 405 | 501 => 12,
            408 | 504 => 4,
            413 | 429 | 431 => 8,
            502 | 503 => 14,
            _ => 2,
        };
        let Self { title, text, .. } = self;
        let said = format!("{title}: {text} (request {id})");
        let mut message = String::new();
        for byte in said.bytes() {
            match byte {
                b' '..=b'~' if byte != b'%' => message.push(char::from(byte)),
                // Writing to a string cannot fail.
                _ => _ = write!(message, "%{byte:02X}"),
            }
        }
        (code, message)
    }
}

/// When to come back to a room that is closed: health checks ask every second or two.
const SOON: Duration = Duration::from_secs(5);

impl Trouble {
    /// What is said of it.
    pub fn words(&self) -> Words {
        let words = |status, reason, title, text: &str| Words {
            status,
            reason,
            title,
            text: text.to_owned(),
            retry_after: None,
        };
        let soon = |words: Words| Words { retry_after: Some(SOON), ..words };
        match self {
            Self::Closed => soon(words(
                503,
                "no_backend",
                "This room is closed for the moment",
                "None of the servers behind it is able to answer just now. Nothing is wrong with your request, and nothing of it has been done. It is worth another try in a few seconds.",
            )),
            Self::Full => soon(words(
                503,
                "full",
                "Too many are before you",
                "The servers behind this door have all that they can do. Nothing of your request has been done. It is worth another try in a few seconds.",
            )),
            Self::Drained => soon(words(
                503,
                "drained",
                "This room is being closed",
                "Its servers are being taken out of service. Nothing of your request has been done. It is worth another try in a few seconds.",
            )),
            Self::Unreachable => soon(words(
                502,
                "unreachable",
                "Nobody opens this door",
                "The server behind it cannot be reached. Nothing of your request has been done. It is worth another try in a few seconds.",
            )),
            Self::Untrusted => words(
                502,
                "untrusted",
                "Somebody else is behind this door",
                "The server behind it does not show that it is the right one, so nothing was handed to it. Nothing is wrong with your request. Who looks after this place has to mend it.",
            ),
            Self::Broken => words(
                502,
                "broken",
                "The answer broke off",
                "The server behind this door began with your request and did not finish. It may have been done or not: look before you send it again.",
            ),
            Self::Slow => words(
                504,
                "slow",
                "No answer in time",
                "The server behind this door took too long. Your request may still be done: look before you send it again.",
            ),
            Self::NoHost => words(
                404,
                "no_host",
                "Nobody of this name here",
                "Nothing is served under this host name. Perhaps it is misspelt.",
            ),
            Self::NoPath => words(
                404,
                "no_path",
                "No such room",
                "Nothing is served under this address. Perhaps it is misspelt, or what was here has moved.",
            ),
            Self::Method(allowed) => words(
                405,
                "method",
                "Not in this way",
                &format!("What is here can be asked for with {allowed} only."),
            ),
            Self::Wrong(why) => words(
                400,
                "bad_request",
                "This request cannot be understood",
                &format!("It is not as HTTP asks for: {why}."),
            ),
            Self::TooLarge => {
                words(413, "too_large", "That is too much", "What you send is larger than this door lets in.")
            }
            // RFC 6585 section 5.
            Self::TooMany => words(
                431,
                "too_many_headers",
                "That is too much",
                "Your request has more headers than this door lets in.",
            ),
            Self::Stalled => words(
                408,
                "stalled",
                "The rest did not come",
                "Your request stopped in the middle for too long. It is worth another try.",
            ),
            Self::Expectation => words(
                417,
                "expectation",
                "That cannot be promised",
                "The request expects something other than 100-continue.",
            ),
            Self::TooOften(wait) => Words {
                retry_after: Some(*wait),
                ..words(
                    429,
                    "too_often",
                    "Not so fast",
                    "More has been asked for from where you are than this room allows. Nothing of your request has been done. It is worth another try later.",
                )
            },
            Self::WebsocketVersion => words(
                426,
                "websocket_version",
                "Not in this version",
                "Websockets are spoken here in version 13 alone.",
            ),
            Self::Unsupported(what) => {
                words(501, "unsupported", "Not done here", &format!("This door does not do {what}."))
            }
            Self::NoCertificate => words(
                403,
                "no_certificate",
                "Your certificate does not hold any more",
                "Who comes in here shows a certificate, and the one that you have shown has run out, or is not believed any more. Connect anew with one that holds.",
            ),
            Self::Refused(refusal) => match refusal {
                Refusal::Missing(_) => words(
                    401,
                    "no_credentials",
                    "Who is there?",
                    "This room is for those who are known. Your request does not say who you are.",
                ),
                Refusal::Wrong(_) => words(
                    401,
                    "wrong_credentials",
                    "That is not known here",
                    "What your request says of who you are is not right, or not right any more.",
                ),
                Refusal::Lacks => words(
                    403,
                    "not_allowed",
                    "This room is not yours",
                    "You are known, and this room is for others. Who looks after it can let you in.",
                ),
                // Seen by who calls by gRPC alone: all others get the answer of who was asked.
                Refusal::Told(answered) => words(
                    if answered.status == 403 { 403 } else { 401 },
                    "forward_auth",
                    "You are not let in",
                    "Who knows the guests of this room does not know you, or not as one of them.",
                ),
                Refusal::Source => words(
                    403,
                    "source",
                    "Not from there",
                    "This room cannot be entered from the address that you call from.",
                ),
                Refusal::Slowed(wait) => Words {
                    retry_after: Some(*wait),
                    ..words(
                        429,
                        "slowed",
                        "Take a breath",
                        "What was said of who you are was wrong too often from where you call, so nobody listens for a while. It is worth another try later.",
                    )
                },
                Refusal::Busy => soon(words(
                    503,
                    "auth_busy",
                    "There is a queue at the door",
                    "Too many want to be known at the same time. Nothing of your request has been done. It is worth another try in a few seconds.",
                )),
                Refusal::Unavailable => soon(words(
                    503,
                    "auth_unavailable",
                    "Nobody can be let in for the moment",
                    "What is needed to know you is not at hand just now. Nothing of your request has been done. It is worth another try in a few seconds.",
                )),
            },
        }
    }

    /// What the client is asked for (RFC 9110 section 11.6.1).
    pub fn challenges(&self) -> &[HeaderValue] {
        match self {
            Self::Refused(Refusal::Missing(challenges) | Refusal::Wrong(challenges)) => challenges,
            _ => &[],
        }
    }

    /// What it is called in metrics and logs.
    pub fn reason(&self) -> &'static str {
        self.words().reason
    }
}

/// How a client would have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `text/html`.
    Html,
    /// `application/json`.
    Json,
    /// `text/plain`.
    Text,
    /// Headers alone, to who calls by gRPC.
    Grpc,
}

impl Form {
    /// For a request with these headers.
    pub fn wanted(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        // `application/grpc`, with `+proto` or the like behind it; `application/grpc-web` is another thing.
        let rest = text(header::CONTENT_TYPE).and_then(|kind| kind.strip_prefix("application/grpc"));
        match rest {
            Some(rest) if rest.is_empty() || rest.starts_with(['+', ';']) => Self::Grpc,
            _ => Self::of(text(header::ACCEPT)),
        }
    }

    /// By what a client accepts (RFC 9110 section 12.5.1); text for who does not care.
    pub fn of(accept: Option<&str>) -> Self {
        let mut best = (0.0, Self::Text);
        for item in accept.unwrap_or_default().split(',') {
            let mut parts = item.split(';').map(str::trim);
            let form = match parts.next().unwrap_or_default().to_ascii_lowercase().as_str() {
                "text/html" | "application/xhtml+xml" => Self::Html,
                json if json == "application/json" || json.ends_with("+json") => Self::Json,
                "text/plain" => Self::Text,
                _ => continue,
            };
            let quality = parts.find_map(|part| part.strip_prefix("q=")).map_or(Ok(1.0), str::parse::<f32>);
            let quality = quality.unwrap_or(0.0);
            if quality > best.0 {
                best = (quality, form);
            }
        }
        best.1
    }

    /// Its media type.
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Html => "text/html; charset=utf-8",
            Self::Json => "application/json",
            Self::Text => "text/plain; charset=utf-8",
            Self::Grpc => "application/grpc",
        }
    }

    /// The words in this form, with the request's number.
    pub fn page(self, words: &Words, id: &str) -> String {
        let Words { status, reason, title, text, .. } = words;
        match self {
            Self::Json => {
                let mut page = serde_json::json!({
                    "status": status, "reason": reason, "title": title, "detail": text, "request_id": id,
                });
                if let Some(after) = words.retry_after_seconds() {
                    page["retry_after_seconds"] = after.into();
                }
                format!("{page}\n")
            }
            Self::Text => format!("{title}\n\n{text}\n\nrequest {id}\n"),
            // Only in headers, see `Words::for_grpc`.
            Self::Grpc => String::new(),
            Self::Html => {
                let mut page =
                    String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
                let (title, text) = (escape(title), escape(text));
                // Writing to a string cannot fail.
                _ = write!(
                    page,
                    "<meta name=\"viewport\" content=\"width=device-width\"><title>{title}</title>\
                     <style>body{{font:1.1rem/1.5 system-ui,sans-serif;max-width:34rem;margin:18vh auto;padding:0 1.5rem;\
                     color:#222;background:#faf9f7}}h1{{font-size:1.6rem}}small{{color:#777}}\
                     @media(prefers-color-scheme:dark){{body{{color:#ddd;background:#1b1b1d}}}}</style></head>\n\
                     <body><h1>{title}</h1><p>{text}</p><p><small>{status} · request {id}</small></p></body></html>\n"
                );
                page
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_what_it_would_rather_have() {
        for (accept, form) in [
            (None, Form::Text),
            (Some("*/*"), Form::Text),
            (Some("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"), Form::Html),
            (Some("application/json"), Form::Json),
            (Some("application/problem+json"), Form::Json),
            (Some("application/json;q=0.5, text/html"), Form::Html),
            (Some("text/html;q=0.2, application/json;q=0.9"), Form::Json),
            (Some("text/html;q=0"), Form::Text),
            (Some("text/html;q=x"), Form::Text),
            (Some(",;,"), Form::Text),
        ] {
            assert_eq!(Form::of(accept), form, "{accept:?}");
        }
    }

    #[test]
    fn grpc_is_answered_as_grpc() {
        let form = |kind: &'static str| {
            let all = [(header::CONTENT_TYPE, kind), (header::ACCEPT, "application/json")];
            Form::wanted(
                &all.map(|(name, value)| (name, HeaderValue::from_static(value))).into_iter().collect(),
            )
        };
        for kind in ["application/grpc", "application/grpc+proto", "application/grpc;x=y"] {
            assert_eq!(form(kind), Form::Grpc, "{kind}");
        }
        for kind in ["application/grpc-web", "application/json", ""] {
            assert_eq!(form(kind), Form::Json, "{kind}");
        }
        let words = Words { text: "50 % of it,\nmüde".into(), ..Trouble::Closed.words() };
        let (code, message) = words.for_grpc("7");
        assert_eq!(code, 14);
        assert_eq!(message, "This room is closed for the moment: 50 %25 of it,%0Am%C3%BCde (request 7)");
        assert_eq!(Trouble::Refused(Refusal::Missing(Vec::new())).words().for_grpc("7").0, 16);
        assert_eq!(Trouble::NoPath.words().for_grpc("7").0, 12);
    }

    #[test]
    fn every_trouble_has_its_words_in_every_form() {
        let all = [
            Trouble::Closed,
            Trouble::Drained,
            Trouble::Unreachable,
            Trouble::Broken,
            Trouble::Slow,
            Trouble::NoHost,
            Trouble::NoPath,
            Trouble::Method("GET, HEAD".into()),
            Trouble::Wrong("there is no Host"),
            Trouble::TooLarge,
            Trouble::TooMany,
            Trouble::Stalled,
            Trouble::Expectation,
            Trouble::Unsupported("tunnels"),
            Trouble::Refused(Refusal::Missing(Vec::new())),
            Trouble::Refused(Refusal::Wrong(Vec::new())),
            Trouble::Refused(Refusal::Lacks),
            Trouble::Refused(Refusal::Source),
            Trouble::Refused(Refusal::Busy),
            Trouble::Refused(Refusal::Unavailable),
        ];
        for trouble in all {
            let words = trouble.words();
            assert!((400..600).contains(&words.status));
            // What is worth another try says when, and is never what may have been done already.
            assert_eq!(words.retry_after.is_some(), words.text.contains("in a few seconds"), "{trouble:?}");
            for form in [Form::Html, Form::Json, Form::Text] {
                let page = form.page(&words, "id-7");
                assert!(page.contains(words.title) && page.contains(&words.text) && page.contains("id-7"));
            }
            let json: serde_json::Value = serde_json::from_str(&Form::Json.page(&words, "7")).unwrap();
            assert_eq!(json["status"], words.status);
        }
    }
}
