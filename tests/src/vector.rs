//! Bytes that strangers may send to the desk, what they are answered, and what of them reaches a backend: every byte of it
//! is looked at.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    desk::{Deed, Desk, HASTY, Recorder, answer, backend},
    requests::Speaker,
};

/// What becomes of a vector.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    /// This status, and not a byte reaches a backend.
    Refused(u16),
    /// The desk closes the connection and says nothing, and not a byte reaches a backend.
    Closed,
    /// This status, after a part has reached a backend: a head with this line, this much of its body and no end of it.
    /// Then its connection is cut.
    Cut(u16, &'static str, &'static str),
    /// The backend sees these requests, method, target and body, and no other.
    Seen(&'static [(&'static str, &'static str)]),
}

/// What it is called, its bytes, and its fate.
pub type Vector<'a> = (&'a str, &'a [u8], Fate);

/// How long a backend's connection may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether something is so before long.
fn comes_to_be(mut is_so: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    while !is_so() {
        if begun.elapsed() >= PATIENCE {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Sends each to a desk of a service with little patience, and compares.
///
/// # Errors
/// When a desk does not start, or neither answers nor closes.
///
/// # Panics
/// When one meets another fate than its own.
pub fn play(vectors: &[Vector<'_>]) -> Result<()> {
    let recorder = Recorder::start(|_| Deed::Say(answer("ok")))?;
    let desk = Desk::start(HASTY, &[("web", vec![backend(recorder.address)])], &[])?;
    let mut wrong = Vec::new();
    let mut names = BTreeSet::new();
    for (name, bytes, fate) in vectors {
        assert!(names.insert(name), "{name} is there twice");
        let mut speaker = Speaker::to(desk.addresses[0])?;
        // Whoever is refused early may be cut off while still talking.
        _ = speaker.say(bytes);
        let first = speaker.hear().with_context(|| (*name).to_owned())?;
        let status = first.as_ref().map(|answer| answer.status);
        let (expected, wanted): (_, &[_]) = match fate {
            Fate::Refused(status) | Fate::Cut(status, ..) => (Some(*status), &[]),
            Fate::Closed => (None, &[]),
            Fate::Seen(wanted) => (Some(200), wanted),
        };
        if let Fate::Seen(_) = fate {
            // Everything of it has been answered when the connection ends: by itself, or after its time.
            speaker.until_closed().with_context(|| (*name).to_owned())?;
        }
        let (mut fits, seen) = recorder.take_just(wanted);
        let mut torn = recorder.take_torn();
        if let Fate::Cut(_, line, body) = fate {
            comes_to_be(|| {
                torn.append(&mut recorder.take_torn());
                !torn.is_empty()
            });
            let is_so = |torn: &String| {
                torn.split_once("\r\n\r\n")
                    .is_some_and(|(head, rest)| head.lines().next() == Some(line) && rest == *body)
            };
            fits &= torn.len() == 1 && torn.iter().all(is_so);
        } else {
            fits &= torn.is_empty();
        }
        if status != expected || !fits {
            wrong.push(format!(
                "{name}: {status:?} rather than {expected:?}, the backend saw {seen:?} and pieces {torn:?}"
            ));
        }
    }
    // Connections that were kept end with the desk, and nothing was left in them.
    drop(desk);
    ensure!(comes_to_be(|| recorder.is_left()), "a connection without its desk goes on");
    let torn = recorder.take_torn();
    assert!(wrong.is_empty() && torn.is_empty(), "{}\nand at the end {torn:?}", wrong.join("\n"));
    Ok(())
}
