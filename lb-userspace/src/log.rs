//! Where the daemon's words go: lines on standard error, as text or JSON. One line an event, none a packet.

use std::io::IsTerminal;

use clap::ValueEnum;
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Words.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// The level is no level.
#[derive(Debug, thiserror::Error)]
#[error(
    "no log level {0:?}; use error, warn, info, debug or trace, or a filter such as info,lb_userspace::probe=debug"
)]
pub struct LogLevelError(String);

/// Begins to log. Only the first call in a process counts.
///
/// # Errors
/// When the level cannot be understood.
pub fn start(format: LogFormat, level: &str) -> Result<(), LogLevelError> {
    // A word that is no level is a part of the program to the filter, of which all is said, and nothing of the others.
    let is_filter = |word: &str| word.contains(['=', '[']) || word.trim().parse::<LevelFilter>().is_ok();
    if !level.split(',').all(is_filter) {
        return Err(LogLevelError(level.to_owned()));
    }
    // The netlink library warns of each message that comes after nobody listens any more.
    let filter = EnvFilter::try_new(format!("netlink_proto=error,{level}"))
        .map_err(|_| LogLevelError(level.to_owned()))?;
    let terminal =
        std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(terminal);
    // A logger that is there already (tests) stays.
    _ = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_level_is_refused() {
        for level in ["loud", "info,loud", "3x"] {
            assert!(start(LogFormat::Text, level).is_err(), "{level}");
        }
        assert!(start(LogFormat::Text, "info,lb_userspace::probe=debug").is_ok());
    }
}
