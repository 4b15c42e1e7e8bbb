//! What clients and servers write down, and the comparison that the demo is judged by.
//!
//! Each side appends a line for everything that happens to a payment, to a file of its own. Lobby's counters
//! play no part in the judgement.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::FromStr,
};

use serde::Serialize;

/// A payment's number, given by the client.
pub type Payment = u64;

/// A line of the clients' ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientLine {
    /// A server said that it is done.
    Acknowledged(Payment),
    /// No connection could be made, so nothing was sent; tried again under the same number.
    Retried(Payment),
    /// It was sent, and the connection broke before the answer; milliseconds since the epoch.
    Broken(Payment, u64),
    /// Given up: nobody could be reached, or no answer came.
    Failed(Payment),
}

/// A line of a server's ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerLine {
    /// It came in, and waits for its round.
    Received(Payment),
    /// It is done.
    Paid(Payment),
}

/// A server's ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerLedger {
    /// The server's name.
    pub server: String,
    /// What it wrote.
    pub lines: Vec<ServerLine>,
}

/// The moment at which a server was killed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kill {
    /// The server's name.
    pub server: String,
    /// Milliseconds since the epoch.
    pub at_ms: u64,
}

/// What comparing the ledgers says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Judgement {
    /// Payments that were tried.
    pub payments: usize,
    /// Done once, and known to be.
    pub acknowledged: usize,
    /// On their way to a server at the moment that it was killed: sent, and never answered.
    pub in_flight: usize,
    /// Those of them that the server had written down as done before it died.
    pub in_flight_done: usize,
    /// Attempts that found nobody and were made again.
    pub retries: usize,
    /// Said to be done and in no server's ledger, or never answered.
    pub lost: BTreeSet<Payment>,
    /// Done more than once.
    pub double: BTreeSet<Payment>,
    /// Done, and no client knows of it.
    pub unknown: BTreeSet<Payment>,
}

impl Judgement {
    /// Nothing was lost, nothing done twice, nothing made up.
    pub fn is_good(&self) -> bool {
        self.payments > 0 && self.lost.is_empty() && self.double.is_empty() && self.unknown.is_empty()
    }
}

/// How long after a kill a connection to the killed server may be noticed to be broken: its kernel resets
/// all of them at once, so this is generous.
const KILL_WINDOW_MS: u64 = 2000;

/// Compares the clients' ledger with the servers'.
pub fn compare(client: &[ClientLine], servers: &[ServerLedger], kills: &[Kill]) -> Judgement {
    let mut times_paid: BTreeMap<Payment, usize> = BTreeMap::new();
    let mut received_by: BTreeMap<Payment, BTreeSet<&str>> = BTreeMap::new();
    for ledger in servers {
        for line in &ledger.lines {
            match line {
                ServerLine::Paid(payment) => *times_paid.entry(*payment).or_default() += 1,
                ServerLine::Received(payment) => {
                    received_by.entry(*payment).or_default().insert(&ledger.server);
                }
            }
        }
    }

    let mut judgement = Judgement::default();
    let mut known = BTreeSet::new();
    for line in client {
        let (ClientLine::Acknowledged(payment)
        | ClientLine::Retried(payment)
        | ClientLine::Broken(payment, _)
        | ClientLine::Failed(payment)) = *line;
        known.insert(payment);
        let done = times_paid.contains_key(&payment);
        match *line {
            ClientLine::Retried(_) => judgement.retries += 1,
            ClientLine::Acknowledged(_) if done => judgement.acknowledged += 1,
            ClientLine::Broken(_, at_ms) if excused(received_by.get(&payment), at_ms, kills) => {
                judgement.in_flight += 1;
                judgement.in_flight_done += usize::from(done);
            }
            ClientLine::Acknowledged(_) | ClientLine::Broken(..) | ClientLine::Failed(_) => {
                judgement.lost.insert(payment);
            }
        }
    }
    judgement.payments = known.len();
    judgement.double =
        times_paid.iter().filter(|(_, times)| **times > 1).map(|(payment, _)| *payment).collect();
    judgement.unknown = times_paid.into_keys().filter(|payment| !known.contains(payment)).collect();
    // Tried again, and then the ledger ends: nobody ever took it.
    let ended: BTreeSet<Payment> = client
        .iter()
        .filter_map(|line| match line {
            ClientLine::Retried(_) => None,
            ClientLine::Acknowledged(payment)
            | ClientLine::Broken(payment, _)
            | ClientLine::Failed(payment) => Some(*payment),
        })
        .collect();
    judgement.lost.extend(known.difference(&ended));
    judgement
}

/// Whether a broken connection was one to a server that was killed at that moment, and to no other.
fn excused(receivers: Option<&BTreeSet<&str>>, at_ms: u64, kills: &[Kill]) -> bool {
    kills.iter().any(|kill| {
        (kill.at_ms..=kill.at_ms + KILL_WINDOW_MS).contains(&at_ms)
            && receivers.is_none_or(|receivers| receivers.iter().all(|server| *server == kill.server))
    })
}

/// Reads a ledger; a line that was cut short, when its writer was killed, is not one.
pub fn read<T: FromStr>(text: &str) -> Vec<T> {
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .filter_map(|line| line.trim().parse().ok())
        .collect()
}

impl std::fmt::Display for ClientLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Acknowledged(payment) => write!(f, "acknowledged {payment}"),
            Self::Retried(payment) => write!(f, "retried {payment}"),
            Self::Broken(payment, at_ms) => write!(f, "broken {payment} {at_ms}"),
            Self::Failed(payment) => write!(f, "failed {payment}"),
        }
    }
}

impl FromStr for ClientLine {
    type Err = ();

    fn from_str(line: &str) -> Result<Self, ()> {
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u64>().map_err(drop);
        match words[..] {
            ["acknowledged", payment] => Ok(Self::Acknowledged(number(payment)?)),
            ["retried", payment] => Ok(Self::Retried(number(payment)?)),
            ["broken", payment, at_ms] => Ok(Self::Broken(number(payment)?, number(at_ms)?)),
            ["failed", payment] => Ok(Self::Failed(number(payment)?)),
            _ => Err(()),
        }
    }
}

impl std::fmt::Display for ServerLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Received(payment) => write!(f, "received {payment}"),
            Self::Paid(payment) => write!(f, "paid {payment}"),
        }
    }
}

impl FromStr for ServerLine {
    type Err = ();

    fn from_str(line: &str) -> Result<Self, ()> {
        let (word, payment) = line.split_once(' ').ok_or(())?;
        let payment = payment.parse().map_err(drop)?;
        match word {
            "received" => Ok(Self::Received(payment)),
            "paid" => Ok(Self::Paid(payment)),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        ClientLine::{self, Acknowledged, Broken, Failed, Retried},
        Judgement, Kill, ServerLedger,
        ServerLine::{self, Paid, Received},
        compare, read,
    };

    fn server(name: &str, lines: &[ServerLine]) -> ServerLedger {
        ServerLedger { server: name.into(), lines: lines.to_vec() }
    }

    fn kill(name: &str) -> Kill {
        Kill { server: name.into(), at_ms: 1000 }
    }

    #[test]
    fn all_is_well_when_each_payment_is_in_one_ledger() {
        let servers = [server("1", &[Received(1), Paid(1)]), server("2", &[Received(2), Paid(2)])];
        let judgement = compare(&[Retried(2), Acknowledged(1), Acknowledged(2)], &servers, &[]);
        assert!(judgement.is_good());
        assert_eq!(judgement, Judgement { payments: 2, acknowledged: 2, retries: 1, ..Judgement::default() });
    }

    #[test]
    fn nothing_at_all_is_not_well() {
        assert!(!compare(&[], &[], &[]).is_good());
    }

    #[test]
    fn an_acknowledged_payment_that_no_server_knows_is_lost() {
        let judgement = compare(&[Acknowledged(1)], &[server("1", &[Received(1)])], &[]);
        assert_eq!(judgement.lost, [1].into());
        assert_eq!(judgement.acknowledged, 0);
        assert!(!judgement.is_good());
    }

    #[test]
    fn a_payment_without_an_answer_is_lost_though_a_server_did_it() {
        let servers = [server("1", &[Received(1), Paid(1), Received(2), Paid(2)])];
        assert_eq!(compare(&[Failed(1), Broken(2, 1500)], &servers, &[]).lost, [1, 2].into());
        assert_eq!(compare(&[Retried(3)], &servers[..0], &[]).lost, [3].into());
    }

    #[test]
    fn a_payment_in_two_ledgers_or_twice_in_one_is_double() {
        let servers = [server("1", &[Paid(1), Paid(2), Paid(2)]), server("2", &[Paid(1)])];
        let judgement = compare(&[Acknowledged(1), Acknowledged(2)], &servers, &[]);
        assert_eq!(judgement.double, [1, 2].into());
        assert!(!judgement.is_good());
    }

    #[test]
    fn a_payment_that_no_client_made_is_unknown() {
        let judgement = compare(&[Acknowledged(1)], &[server("1", &[Paid(1), Paid(9)])], &[]);
        assert_eq!(judgement.unknown, [9].into());
        assert!(!judgement.is_good());
    }

    #[test]
    fn only_what_was_in_flight_to_the_killed_server_is_excused() {
        let servers = [server("1", &[Received(1), Received(2), Paid(2)]), server("2", &[Received(4)])];
        let client = [
            Broken(1, 1000), // waiting there
            Broken(2, 1100), // done there, not answered
            Broken(3, 1100), // sent, not read by anybody
            Broken(4, 1100), // at a living server
            Broken(5, 999),  // before
            Broken(6, 3001), // long after
        ];
        let judgement = compare(&client, &servers, &[kill("1")]);
        assert_eq!((judgement.in_flight, judgement.in_flight_done), (3, 1));
        assert_eq!(judgement.lost, [4, 5, 6].into());
    }

    #[test]
    fn ledgers_are_read_as_they_were_written() {
        let lines = [Acknowledged(1), Retried(2), Broken(3, 4), Failed(5)];
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        assert_eq!(read::<ClientLine>(&text), lines);
        let lines = [Received(1), Paid(12)];
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        assert_eq!(read::<ServerLine>(&text), lines);
        // Cut short: not payment 1.
        assert_eq!(read::<ServerLine>(&text[..text.len() - 2]), [Received(1)]);
    }
}
