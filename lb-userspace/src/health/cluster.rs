//! Who of a database cluster is the primary, and which replicas are fit: from what each says of itself.
//!
//! Pure. A write that reaches a server which is not the primary is the worst that can happen, so in doubt
//! nobody but the one that has had the writes gets them:
//!
//! - What a server says of its role holds from its one answer on. Silence is no answer: who has had the
//!   writes keeps them until the check's `fall` failures, and after that gets no new connections, while
//!   those that it has stay until it, or another that is the primary now, answers.
//! - A promotion begins a new timeline. Who claims to be the primary on a later timeline than the one
//!   followed so far is followed at once. On an earlier one it is an old primary that has come back: it is
//!   never followed, even when it is the only one left, since what was written since is not there.
//! - Where timelines cannot tell, the present primary stays until it says that it is none, and an alarm is
//!   raised. An operator can say who it is.
//! - After a start nobody is followed before all have been asked, but who had the writes before goes on.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::{self, Write},
    time::Duration,
};

use super::role::{Observation, Says};
use crate::model::BackendAddress;

/// Positions of the primary that are remembered to tell how long a replica is behind.
const POSITIONS: usize = 4096;

/// What the servers of one cluster say, and who is followed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    servers: BTreeMap<BackendAddress, Server>,
    /// Who has the writes, or had them last.
    present: Option<BackendAddress>,
    /// The timeline that was followed last, whoever it was.
    timeline: Option<u32>,
    /// Everybody has been asked once.
    started: bool,
    /// As last decided: who gets new connections that write.
    primary: Option<BackendAddress>,
    since: Duration,
    why: String,
    /// How often that has changed.
    changes: u64,
    doubt: Option<Doubt>,
    /// When the primary was how far, the latest last.
    positions: VecDeque<(Duration, u64)>,
}

/// What is known of one server.
#[derive(Clone, Debug, Default, PartialEq)]
struct Server {
    /// Its last answer.
    last: Option<Observation>,
    heard: Heard,
    /// When what it says of its role last changed.
    since: Duration,
    /// What it was before a restart of the daemon.
    presumed: Option<Says>,
    /// Not to be used, by the operator's wish.
    disabled: bool,
    fit: bool,
    /// Answers in a row that speak against `fit`.
    against: u32,
}

/// What came of the last question to a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Heard {
    /// It has not been asked.
    #[default]
    Nothing,
    /// It has answered.
    Answer,
    /// It has not, which may be nothing.
    Silence,
    /// It has not for so long that it counts as gone.
    Gone,
}

/// How a replica is judged.
#[derive(Clone, Copy, Debug)]
pub struct Fitness {
    /// How far behind it may be.
    pub max_lag: Option<Duration>,
    /// Answers in a row within that make it fit again.
    pub rise: u32,
    /// Answers in a row beyond that make it unfit.
    pub fall: u32,
}

/// How far a replica is behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// In bytes that the primary has written; `None`: nobody knows.
    pub bytes: Option<u64>,
    /// For how long what the primary wrote has been missing; `None`: nobody knows.
    pub time: Option<Duration>,
}

/// What follows from an answer, or from silence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Somebody else gets the writes, or nobody: from, to, and why.
    pub turned: Option<(Option<BackendAddress>, Option<BackendAddress>, String)>,
    /// What the server says of its role, where it said otherwise before.
    pub role: Option<(Option<Says>, Says)>,
    /// There is a doubt that there was not, or another, or none any more.
    pub doubted: Option<Option<Doubt>>,
    /// Everybody should be asked now, rather than when it is their turn.
    pub urgent: bool,
    /// Which replicas are fit has changed.
    pub fitness: bool,
}

impl Outcome {
    /// Whether anything follows for who gets connections.
    pub fn changes(&self) -> bool {
        self.turned.is_some() || self.role.is_some() || self.fitness || self.doubted.is_some()
    }
}

impl Cluster {
    /// One of which nothing is known.
    pub fn new(now: Duration) -> Self {
        Self { since: now, ..Self::default() }
    }

    /// The servers are these now, each with whether the operator has disabled it. `remembered`: what they
    /// were before a restart; who of them had the writes.
    pub fn configure(
        &mut self,
        servers: impl IntoIterator<Item = (BackendAddress, bool)>,
        remembered: &BTreeMap<BackendAddress, Says>,
        now: Duration,
    ) -> Outcome {
        let mut before = std::mem::take(&mut self.servers);
        for (address, disabled) in servers {
            let server = match before.remove(&address) {
                // Nobody asks who is disabled, so what it said is old.
                Some(known) if !disabled => Server { disabled, ..known },
                _ if disabled => Server { disabled, ..Server::default() },
                _ => Server { presumed: remembered.get(&address).copied(), ..Server::default() },
            };
            self.servers.insert(address, server);
        }
        if self.present.is_none() {
            let primary = |(&address, &says): (&BackendAddress, &Says)| {
                (says == Says::Primary && self.servers.contains_key(&address)).then_some(address)
            };
            self.present = remembered.iter().find_map(primary);
            self.primary = self.present;
        }
        if self.present.is_some_and(|present| !self.servers.contains_key(&present)) {
            self.present = None;
            self.positions.clear();
        }
        self.decide(now)
    }

    /// A server has answered.
    pub fn hear(
        &mut self,
        address: BackendAddress,
        said: Observation,
        fitness: Fitness,
        now: Duration,
    ) -> Outcome {
        let Some(server) = self.servers.get_mut(&address) else { return Outcome::default() };
        let before = server.says();
        let turned = server.last.is_none_or(|last| last.says != said.says);
        if turned {
            server.since = now;
        }
        server.heard = Heard::Answer;
        server.last = Some(said);
        let mut outcome = self.decide(now);
        if self.primary == Some(address) {
            self.note_position(said.position, now);
        }
        outcome.fitness |= self.judge(address, turned, fitness, now);
        outcome.role = turned.then_some((before, said.says));
        outcome.urgent |= turned && before.is_some();
        outcome
    }

    /// A server has not answered. `gone`: for so long that it counts as unhealthy.
    pub fn miss(&mut self, address: BackendAddress, gone: bool, now: Duration) -> Outcome {
        let Some(server) = self.servers.get_mut(&address) else { return Outcome::default() };
        let first = server.heard == Heard::Answer;
        server.heard = if gone { Heard::Gone } else { Heard::Silence };
        let mut outcome = self.decide(now);
        // Whoever takes over may be doing so now.
        outcome.urgent |= first && self.present == Some(address);
        outcome
    }

    /// An operator says who the primary is; it must say so itself.
    ///
    /// # Errors
    /// Why it is not followed.
    pub fn tell(&mut self, address: BackendAddress, now: Duration) -> Result<Outcome, String> {
        let Some(server) = self.servers.get(&address) else {
            return Err(format!("{address} is not in the pool"));
        };
        if !server.claims() {
            return Err(format!("{address} does not say that it is a primary which takes writes"));
        }
        let timeline = server.timeline();
        let later = |(_, other): &(&BackendAddress, &Server)| other.claims() && other.timeline() > timeline;
        if let Some((later, _)) = self.servers.iter().find(later) {
            return Err(format!("{later} says that it is the primary, on a later timeline; stop it first"));
        }
        self.timeline = timeline;
        self.positions.clear();
        self.present = Some(address);
        Ok(self.turn(Choice { primary: Some(address), why: "an operator said so", doubt: None }, now))
    }

    /// Who gets new connections that write.
    pub fn primary(&self) -> Option<BackendAddress> {
        self.primary
    }

    /// Who had the writes last and may still have connections: nobody has taken its place, and it has not said
    /// that it is the primary no more.
    pub fn lingering(&self) -> Option<BackendAddress> {
        let present = self.present.filter(|_| self.primary.is_none())?;
        (!self.servers.get(&present)?.is_demoted()).then_some(present)
    }

    /// Whether anybody has ever had the writes.
    pub fn is_led(&self) -> bool {
        self.present.is_some()
    }

    /// Whether a server is a replica that is fit to be read from.
    pub fn is_fit(&self, address: BackendAddress) -> bool {
        self.servers.get(&address).is_some_and(|server| match server.last {
            Some(last) => last.says == Says::Replica && server.fit,
            None => server.presumed == Some(Says::Replica),
        })
    }

    /// What a server says it is.
    pub fn says(&self, address: BackendAddress) -> Option<(Observation, Duration)> {
        self.servers.get(&address).and_then(|server| Some((server.last?, server.since)))
    }

    /// Whether the last question to a server was answered.
    pub fn answers(&self, address: BackendAddress) -> bool {
        self.servers.get(&address).is_some_and(|server| server.heard == Heard::Answer)
    }

    /// How often writes have gone elsewhere.
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// What speaks against there being one primary.
    pub fn doubt(&self) -> Option<&Doubt> {
        self.doubt.as_ref()
    }

    /// Since when it is as it is with the primary.
    pub fn since(&self) -> Duration {
        self.since
    }

    /// The same, and why. Where nobody has had the writes yet, why that is so by now.
    pub fn turned(&self) -> (Duration, String) {
        let why = match self.primary {
            _ if !self.why.is_empty() => return (self.since, self.why.clone()),
            Some(_) => "it had them when the daemon began",
            None if !self.started => "not everybody has been asked yet",
            None => self.choose().why,
        };
        let sayings = self.sayings();
        (self.since, if sayings.is_empty() { why.to_owned() } else { format!("{why}: {sayings}") })
    }

    /// The timeline that was followed last, and who had the writes on it.
    pub fn followed(&self) -> (Option<BackendAddress>, Option<u32>) {
        (self.present, self.timeline)
    }

    /// Remembers from before a restart which timeline was followed.
    pub fn remember_timeline(&mut self, timeline: u32) {
        self.timeline = self.timeline.max(Some(timeline));
    }

    /// How far a replica is behind the primary.
    pub fn lag(&self, address: BackendAddress, now: Duration) -> Lag {
        let Some(said) = self.servers.get(&address).and_then(|server| server.last) else {
            return Lag::default();
        };
        if said.says != Says::Replica {
            return Lag::default();
        }
        let Some((&(_, latest), position)) = self.positions.back().zip(said.position) else {
            return Lag { bytes: None, time: said.own_lag };
        };
        let missing = latest.saturating_sub(position);
        // When the primary was first seen to have what is missing.
        let ahead = self.positions.iter().position(|&(_, written)| written > position);
        let time = match ahead {
            None => Duration::ZERO,
            // It was behind already when we began to look: for how long, only it can say.
            Some(0) => (now - self.positions[0].0.min(now)).max(said.own_lag.unwrap_or_default()),
            Some(number) => now - self.positions[number].0.min(now),
        };
        Lag { bytes: Some(missing), time: Some(time) }
    }

    fn note_position(&mut self, position: Option<u64>, now: Duration) {
        let Some(position) = position else { return };
        match self.positions.back() {
            Some(&(_, last)) if last == position => {}
            _ => self.positions.push_back((now, position)),
        }
        if self.positions.len() > POSITIONS {
            self.positions.pop_front();
        }
    }

    /// Whether a replica is fit; says whether that has changed. The first answer decides, and then so many
    /// in a row.
    fn judge(&mut self, address: BackendAddress, first: bool, fitness: Fitness, now: Duration) -> bool {
        let lag = self.lag(address, now);
        let within = match (fitness.max_lag, lag.time) {
            (Some(most), Some(lag)) => lag <= most,
            _ => true,
        };
        let Some(server) = self.servers.get_mut(&address) else { return false };
        let before = server.fit;
        if first {
            (server.fit, server.against) = (within, 0);
        } else if server.fit == within {
            server.against = 0;
        } else {
            server.against += 1;
            if server.against >= if within { fitness.rise } else { fitness.fall } {
                (server.fit, server.against) = (within, 0);
            }
        }
        before != server.fit
    }

    fn decide(&mut self, now: Duration) -> Outcome {
        let asked = |server: &Server| server.disabled || server.heard != Heard::Nothing;
        self.started |= !self.servers.is_empty() && self.servers.values().all(asked);
        let choice = self.choose();
        self.turn(choice, now)
    }

    fn turn(&mut self, choice: Choice, now: Duration) -> Outcome {
        let mut outcome = Outcome::default();
        if let Some(address) = choice.primary {
            let said = self.servers.get(&address).and_then(|server| server.last);
            if self.present != Some(address) {
                self.positions.clear();
            }
            self.present = Some(address);
            self.timeline = said.and_then(|said| said.timeline).or(self.timeline);
        }
        if self.primary != choice.primary {
            let why = format!("{}: {}", choice.why, self.sayings());
            outcome.turned = Some((self.primary, choice.primary, why.clone()));
            outcome.urgent = true;
            self.changes += 1;
            (self.primary, self.since, self.why) = (choice.primary, now, why);
        }
        if self.doubt != choice.doubt {
            outcome.urgent |= choice.doubt.is_some();
            self.doubt.clone_from(&choice.doubt);
            outcome.doubted = Some(choice.doubt);
        }
        outcome
    }

    /// Who gets the writes, from what is known now.
    fn choose(&self) -> Choice {
        let present = self.present.and_then(|address| Some((address, self.servers.get(&address)?)));
        let standing = present.filter(|(_, server)| server.stands());
        let stays = |why| Choice { primary: standing.map(|(address, _)| address), why, doubt: None };
        // Who claims to be the primary, beside the one that has had the writes.
        let claims = self
            .servers
            .iter()
            .filter(|(address, server)| server.claims() && Some(**address) != self.present);
        let rivals: Vec<(BackendAddress, Option<u32>)> =
            claims.map(|(&address, server)| (address, server.timeline())).collect();
        if rivals.is_empty() {
            return stays(match (present, standing) {
                (_, Some(_)) => "it alone says that it is the primary",
                (Some((_, server)), None) if server.heard == Heard::Gone => {
                    "the primary does not answer, and nobody else says that it is one"
                }
                _ => "nobody says that it is a primary which takes writes",
            });
        }
        if !self.started {
            // Somebody who has not been asked yet may have been promoted since.
            return stays("not everybody has been asked yet");
        }
        if let Some(latest) = self.latest(&rivals, standing.map(|(_, server)| server)) {
            let mut others: Vec<_> = rivals.iter().map(|&(address, _)| address).collect();
            others.extend(standing.filter(|(_, server)| server.claims()).map(|(address, _)| address));
            others.retain(|&address| address != latest);
            return Choice {
                primary: Some(latest),
                why: "it is the primary of the latest timeline",
                doubt: (!others.is_empty()).then_some(Doubt { writer: Some(latest), others }),
            };
        }
        if standing.is_none()
            && let [(address, timeline)] = rivals[..]
        {
            let earlier = timeline.zip(self.timeline).is_some_and(|(timeline, followed)| timeline < followed);
            let same = timeline.is_some() && timeline == self.timeline;
            let demoted = present.is_none_or(|(_, server)| server.is_demoted());
            // On the same timeline nobody has been promoted: silence of the one before is not enough.
            if !earlier && (demoted || !same) {
                let why = "it alone says that it is the primary";
                return Choice { primary: Some(address), why, doubt: None };
            }
        }
        let others = rivals.iter().map(|&(address, _)| address).collect();
        let why = "it cannot be told who of those that say so is the primary";
        let choice = stays(why);
        Choice { doubt: Some(Doubt { writer: choice.primary, others }), ..choice }
    }

    /// The one of these that is on a later timeline than everybody else, and than any that was followed.
    fn latest(
        &self,
        rivals: &[(BackendAddress, Option<u32>)],
        standing: Option<&Server>,
    ) -> Option<BackendAddress> {
        let timelines = rivals.iter().map(|&(_, timeline)| timeline).collect::<Option<Vec<u32>>>()?;
        let newest = timelines.into_iter().max()?;
        let mut at_newest = rivals.iter().filter(|(_, timeline)| *timeline == Some(newest));
        let (&(address, _), None) = (at_newest.next()?, at_newest.next()) else { return None };
        // Of one that stands and has not said its timeline, nothing is known to be later.
        let followed = self.timeline.max(standing.and_then(Server::timeline));
        match (followed, standing) {
            // Of whoever was followed on it, nothing is known: this must be that one.
            (Some(followed), None) if self.present.is_none() => newest >= followed,
            (Some(followed), _) => newest > followed,
            (None, standing) => standing.is_none(),
        }
        .then_some(address)
    }

    /// What everybody says, for a log: a decision is to be understood from its line alone.
    fn sayings(&self) -> String {
        let mut text = String::new();
        for (address, server) in &self.servers {
            // Writing to a string cannot fail.
            _ = write!(text, "{}{address} ", if text.is_empty() { "" } else { "; " });
            _ = match (server.disabled, server.last) {
                (true, _) => write!(text, "is disabled"),
                (_, None) if server.heard == Heard::Nothing => write!(text, "has not been asked"),
                (_, None) => write!(text, "does not answer"),
                (_, Some(last)) if server.heard == Heard::Answer => write!(text, "says {last}"),
                (_, Some(last)) => write!(text, "does not answer, said {last}"),
            };
        }
        text
    }
}

/// A decision.
struct Choice {
    primary: Option<BackendAddress>,
    why: &'static str,
    doubt: Option<Doubt>,
}

/// More than one says that it is the primary, or one of whom it cannot be believed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Doubt {
    /// Who gets the writes nevertheless.
    pub writer: Option<BackendAddress>,
    /// Who says that it is the primary, and gets none.
    pub others: Vec<BackendAddress>,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let others: Vec<_> = self.others.iter().map(ToString::to_string).collect();
        let others = others.join(" and ");
        match self.writer {
            Some(writer) => write!(
                f,
                "{others} says that it is the primary too: writes go to {writer} alone; stop {others} or make it a replica"
            ),
            None => write!(
                f,
                "{others} says that it is the primary and it cannot be told whether that is so: nobody gets writes; stop who is not, or say who is with `lb pool promote`"
            ),
        }
    }
}

impl Server {
    fn says(&self) -> Option<Says> {
        self.last.map(|last| last.says).or(self.presumed)
    }

    fn timeline(&self) -> Option<u32> {
        self.last.and_then(|last| last.timeline)
    }

    /// Its last answer is that it takes writes.
    fn claims(&self) -> bool {
        !self.disabled && self.heard == Heard::Answer && self.last.is_some_and(|last| last.takes_writes())
    }

    /// It has had the writes and nothing has been heard against it.
    fn stands(&self) -> bool {
        let said = match self.last {
            Some(last) => last.takes_writes(),
            None => self.presumed == Some(Says::Primary),
        };
        !self.disabled && said && self.heard != Heard::Gone
    }

    /// It has said that it is not the primary, or is out of use.
    fn is_demoted(&self) -> bool {
        self.disabled || (self.last.is_some_and(|last| last.says != Says::Primary))
    }
}

#[cfg(test)]
mod tests;
