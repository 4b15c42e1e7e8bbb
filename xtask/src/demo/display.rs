//! What one sees of the demo: bars on a terminal, plain lines elsewhere.

use std::{
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    customers::Shop,
    server::{Report, until_next_round},
};

/// Where a server stands in the story.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Added, not yet found healthy.
    Joining,
    /// Gets new connections.
    Serving,
    /// Gets none; finishes what it has.
    Draining,
    /// Killed.
    Dead,
}

/// A server in the picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// Where it stands.
    pub state: State,
    /// Its last round.
    pub last: Report,
    /// Payments it has done in all.
    pub total: usize,
}

/// The clients in the picture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Customers {
    /// How many there are.
    pub number: usize,
    /// Payments that wait for their answer.
    pub waiting: usize,
    /// Payments acknowledged.
    pub paid: usize,
    /// Attempts that found nobody and were made again.
    pub retried: usize,
    /// Payments whose connection broke.
    pub broken: usize,
    /// Payments given up.
    pub lost: usize,
}

/// The picture: shared by who changes it and who shows it.
pub type Scene = Arc<Mutex<Vec<Server>>>;

/// What there is to be seen.
pub trait View: Send + Sync {
    /// One line about now.
    fn plain(&self, at: Duration) -> String;

    /// The picture, line by line.
    fn picture(&self, colours: bool) -> Vec<String>;

    /// Waits until there is something new; for a line, until it is worth one.
    fn wait(&self, terminal: bool);
}

/// The payment servers and who comes to pay.
pub struct Payments {
    /// The servers.
    pub scene: Scene,
    /// The clients.
    pub shop: Arc<Shop>,
    /// What fills a bar.
    pub per_round: usize,
    /// How long a round is.
    pub round: Duration,
}

/// Shows a view until dropped.
pub struct Display {
    screen: Arc<Screen>,
    thread: Option<JoinHandle<()>>,
}

struct Screen {
    view: Box<dyn View>,
    terminal: bool,
    colours: bool,
    start: Instant,
    /// Lines of the picture that are on the terminal now.
    drawn: Mutex<usize>,
    closing: AtomicBool,
}

impl Display {
    /// Begins to show.
    pub fn new(view: impl View + 'static) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let screen = Arc::new(Screen {
            view: Box::new(view),
            terminal,
            colours: terminal && std::env::var_os("NO_COLOR").is_none(),
            start: Instant::now(),
            drawn: Mutex::new(0),
            closing: AtomicBool::new(false),
        });
        let theirs = screen.clone();
        let thread = std::thread::spawn(move || {
            while !theirs.closing.load(Relaxed) {
                theirs.view.wait(theirs.terminal);
                theirs.show();
            }
        });
        Self { screen, thread: Some(thread) }
    }

    /// Tells a step of the story.
    pub fn say(&self, text: &str) {
        self.screen.say(text);
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.screen.closing.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // If it has failed, there was less to see.
            let _ = thread.join();
        }
    }
}

impl View for Payments {
    fn plain(&self, at: Duration) -> String {
        plain(at, &self.servers(), self.customers())
    }

    fn picture(&self, colours: bool) -> Vec<String> {
        picture(&self.servers(), self.customers(), self.per_round, colours)
    }

    fn wait(&self, terminal: bool) {
        if terminal {
            std::thread::sleep(Duration::from_millis(100));
        } else {
            // Once a round, when all have told about it.
            std::thread::sleep(until_next_round(self.round));
            std::thread::sleep(self.round / 5);
        }
    }
}

impl Payments {
    fn servers(&self) -> Vec<Server> {
        self.scene.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn customers(&self) -> Customers {
        Customers {
            number: self.shop.customers.load(Relaxed),
            waiting: self.shop.waiting.load(Relaxed),
            paid: self.shop.paid.load(Relaxed),
            retried: self.shop.retried.load(Relaxed),
            broken: self.shop.broken.load(Relaxed),
            lost: self.shop.failed.load(Relaxed),
        }
    }
}

impl Screen {
    fn show(&self) {
        if !self.terminal {
            let line = self.view.plain(self.start.elapsed());
            if !self.closing.load(Relaxed) {
                println!("{line}");
            }
            return;
        }
        let lines = self.view.picture(self.colours);
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        // Lines that are too long for the terminal are cut, not wrapped: else the way back up would be wrong.
        let mut out = over(*drawn) + "\x1b[?7l";
        for line in &lines {
            // Erases to the end of the line, in case it was longer.
            let _ = writeln!(out, "{line}\x1b[K");
        }
        out += "\x1b[?7h";
        *drawn = lines.len();
        print(&out);
    }

    fn say(&self, text: &str) {
        let seconds = self.start.elapsed().as_secs();
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        // Above the picture, which is drawn again below.
        let mut out = over(*drawn);
        if self.terminal {
            out += "\x1b[J";
        }
        *drawn = 0;
        let (bold, plain) = if self.colours { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
        let _ = writeln!(out, "{seconds:>3} s  {bold}{text}{plain}");
        print(&out);
    }
}

/// Back to the first line of what was drawn.
fn over(lines: usize) -> String {
    if lines == 0 { String::new() } else { format!("\x1b[{lines}A\r") }
}

fn print(text: &str) {
    let mut out = std::io::stdout();
    // Nobody may be looking any more; the story goes on.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// One line about a round.
pub fn plain(at: Duration, servers: &[Server], customers: Customers) -> String {
    let mut line = format!("{:>3} s  {}", at.as_secs(), words(customers));
    for (i, server) in servers.iter().enumerate() {
        line += if i == 0 { "; paid this round: " } else { ", " };
        let _ = match server.state {
            State::Dead => write!(line, "{} dead", server.name),
            State::Draining => write!(line, "{} {} (draining)", server.name, server.last.paid),
            State::Joining => write!(line, "{} joining", server.name),
            State::Serving => write!(line, "{} {}", server.name, server.last.paid),
        };
    }
    line
}

/// The picture, line by line.
pub fn picture(servers: &[Server], customers: Customers, per_round: usize, colours: bool) -> Vec<String> {
    const WIDTH: usize = 25;
    let mut lines = vec![String::new()];
    for Server { name, address, state, last, total } in servers {
        let filled = (last.paid * WIDTH).div_ceil(per_round.max(1)).min(WIDTH);
        let (word, colour) = match state {
            State::Joining => ("joining", "\x1b[33m"),
            State::Serving => ("serving", "\x1b[32m"),
            State::Draining => ("draining", "\x1b[36m"),
            State::Dead => ("killed", "\x1b[31m"),
        };
        let (colour, end) = if colours { (colour, "\x1b[0m") } else { ("", "") };
        lines.push(format!(
            "  server {name:<3} {address:<16} {colour}{word:<9}{bar:<WIDTH$}{end} {paid:>3} this round {waiting:>4} waiting {total:>6} paid",
            bar = "█".repeat(filled),
            paid = last.paid,
            waiting = last.waiting,
        ));
    }
    lines.push(String::new());
    lines.push(format!("  {}", words(customers)));
    lines
}

fn words(customers: Customers) -> String {
    let Customers { number, waiting, paid, retried, broken, lost } = customers;
    format!(
        "{number} customers: {waiting} waiting, {paid} paid, {retried} tried again, {broken} broken off, {lost} lost"
    )
}

#[cfg(test)]
mod tests {
    use super::{Customers, Report, Server, State, picture, plain};
    use std::time::Duration;

    fn server(name: &str, state: State, paid: usize) -> Server {
        let last = Report { round: 1, paid, waiting: 7 };
        Server { name: name.into(), address: "10.2.0.10".into(), state, last, total: 120 }
    }

    #[test]
    fn a_plain_line_says_it_all() {
        let servers =
            [server("1", State::Serving, 50), server("2", State::Dead, 0), server("3", State::Joining, 0)];
        let customers = Customers { number: 100, waiting: 50, paid: 30, retried: 2, broken: 1, lost: 0 };
        assert_eq!(
            plain(Duration::from_secs(4), &servers, customers),
            "  4 s  100 customers: 50 waiting, 30 paid, 2 tried again, 1 broken off, 0 lost; paid this round: 1 50, 2 dead, 3 joining"
        );
    }

    #[test]
    fn bars_are_as_long_as_the_round_was_full() {
        let bar = |paid| {
            let lines = picture(&[server("1", State::Serving, paid)], Customers::default(), 50, false);
            lines[1].chars().filter(|c| *c == '█').count()
        };
        assert_eq!((bar(0), bar(1), bar(25), bar(50), bar(99)), (0, 1, 13, 25, 25));
    }

    #[test]
    fn without_colours_there_are_no_escapes() {
        let lines = picture(&[server("1", State::Draining, 9)], Customers::default(), 50, false);
        assert!(lines.iter().all(|line| !line.contains('\x1b')));
        assert!(lines[1].contains("draining"));
    }
}
