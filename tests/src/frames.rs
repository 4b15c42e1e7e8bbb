//! A client of HTTP/2 that says exactly the frames it is told, good ones and bad ones (RFC 9113).

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};

/// How long something may take to come.
const PATIENCE: Duration = Duration::from_secs(20);

/// RFC 9113 section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Types of frames (RFC 9113 section 6).
pub mod kind {
    #![expect(missing_docs, reason = "they are called as in the RFC")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const WINDOW_UPDATE: u8 = 8;
    pub const CONTINUATION: u8 = 9;
}

/// Nothing more of the stream follows.
pub const END_STREAM: u8 = 1;
/// Nothing more of the headers follows.
pub const END_HEADERS: u8 = 4;

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its type.
    pub kind: u8,
    /// Its flags.
    pub flags: u8,
    /// Its stream.
    pub stream: u32,
    /// What is in it.
    pub payload: Vec<u8>,
}

/// What comes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer with this status.
    Status(u16),
    /// Its stream is reset.
    Reset,
    /// The connection ends, by an error or without a word.
    Ended,
}

/// The bytes of a frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Fields as literals that nobody is to remember (RFC 7541 section 6.2.2).
pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for text in [name, value] {
            integer(&mut bytes, text.len());
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// RFC 7541 section 5.1, with seven bits in the first byte.
fn integer(bytes: &mut Vec<u8>, mut number: usize) {
    let low = |number: usize| u8::try_from(number & 0x7f).unwrap_or_default();
    if number < 127 {
        return bytes.push(low(number));
    }
    bytes.push(127);
    number -= 127;
    while number >= 128 {
        bytes.push(low(number) | 0x80);
        number >>= 7;
    }
    bytes.push(low(number));
}

/// The bytes of a request's headers, in one frame.
pub fn request(stream: u32, flags: u8, all: &[(&str, &str)]) -> Vec<u8> {
    frame(kind::HEADERS, END_HEADERS | flags, stream, &fields(all))
}

/// The status at the beginning of an answer's fields (RFC 7541 appendix A, and of B the digits).
fn status(block: &[u8]) -> Option<u16> {
    const KNOWN: [u16; 7] = [200, 204, 206, 304, 400, 404, 500];
    // A change of the table's size may come first.
    let start = block.iter().position(|byte| byte & 0xe0 != 0x20)?;
    let block = &block[start..];
    let first = *block.first()?;
    if (0x88..=0x8e).contains(&first) {
        return KNOWN.get(usize::from(first - 0x88)).copied();
    }
    // A literal whose name is that of number 8, `:status`, whether it is to be remembered or not.
    if ![0x48, 0x08, 0x18].contains(&first) {
        return None;
    }
    let length = *block.get(1)?;
    let value = block.get(2..2 + usize::from(length & 0x7f))?;
    if length & 0x80 == 0 {
        return std::str::from_utf8(value).ok()?.parse().ok();
    }
    let mut bits = value.iter().flat_map(|byte| (0..8).rev().map(move |at| u16::from(byte >> at & 1)));
    let mut take = |count: usize| bits.by_ref().take(count).fold(0, |sum, bit| sum << 1 | bit);
    let digit = |_| match take(5) {
        // 0, 1 and 2 have five bits, the others six.
        small @ 0..=2 => small,
        other => (other << 1 | take(1)) - 0x16,
    };
    Some((0..3).map(digit).collect::<Vec<_>>().iter().fold(0, |sum, digit| sum * 10 + digit))
}

/// A connection.
pub struct Frames {
    stream: TcpStream,
    left: Vec<u8>,
}

impl Frames {
    /// Connects, and begins by prior knowledge.
    ///
    /// # Errors
    /// When the connection is not made.
    pub fn to(address: SocketAddr) -> Result<Self> {
        let mut frames = Self::silent(address)?;
        frames.say(PREFACE)?;
        // SETTINGS_HEADER_TABLE_SIZE: nothing is to be remembered of what was said.
        frames.say(&frame(kind::SETTINGS, 0, 0, &[0, 1, 0, 0, 0, 0]))?;
        Ok(frames)
    }

    /// Connects, and says nothing.
    ///
    /// # Errors
    /// When the connection is not made.
    pub fn silent(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, left: Vec::new() })
    }

    /// Says these bytes.
    ///
    /// # Errors
    /// When the connection is closed.
    pub fn say(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// The same connection, to say more while somebody hears.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn voice(&self) -> std::io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// The next frame; `None`: the connection was closed.
    ///
    /// # Errors
    /// When nothing comes in time.
    pub fn hear(&mut self) -> Result<Option<Frame>> {
        loop {
            if let Some(head) = self.left.first_chunk::<9>() {
                let [a, b, c, kind, flags, s @ ..] = *head;
                let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
                let stream = u32::from_be_bytes(s) & 0x7fff_ffff;
                if self.left.len() >= 9 + length {
                    let payload = self.left.drain(..9 + length).skip(9).collect();
                    return Ok(Some(Frame { kind, flags, stream, payload }));
                }
            }
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(length) => self.left.extend_from_slice(&buffer[..length]),
                Err(error) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&error.kind()) => {
                    return Ok(None);
                }
                Err(error) => return Err(error).context("nothing comes"),
            }
        }
    }

    /// What comes of the request on a stream.
    ///
    /// # Errors
    /// When nothing does, in time.
    pub fn outcome(&mut self, stream: u32) -> Result<Outcome> {
        loop {
            let Some(heard) = self.hear()? else { return Ok(Outcome::Ended) };
            match heard.kind {
                kind::HEADERS if heard.stream == stream => {
                    let status = status(&heard.payload);
                    return status.map(Outcome::Status).with_context(|| format!("no status in {heard:?}"));
                }
                kind::RST_STREAM if heard.stream == stream => return Ok(Outcome::Reset),
                kind::GOAWAY if heard.payload.get(4..8) != Some(&[0; 4]) => return Ok(Outcome::Ended),
                _ => {}
            }
        }
    }

    /// Waits until the connection is closed; the frames that came before.
    ///
    /// # Errors
    /// When it stays open.
    pub fn until_closed(&mut self) -> Result<Vec<Frame>> {
        let mut all = Vec::new();
        while let Some(frame) = self.hear()? {
            all.push(frame);
        }
        Ok(all)
    }
}
