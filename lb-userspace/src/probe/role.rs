//! Asks by HTTP who is the primary, as Patroni's REST API answers: 200 on the path of the role that a
//! server has, another status on the other.

use std::net::SocketAddr;

use super::{ProbeError, connect, http};
use crate::health::{Observation, Says};

/// Asks for both paths. Who answers 200 on neither is not fit for anything now; on both, the primary's
/// counts.
pub(super) async fn ask(target: SocketAddr, primary: &str, replica: &str) -> Result<Observation, ProbeError> {
    let (status, body) = http::fetch(connect(target).await?, target, primary).await?;
    if status == 200 {
        return Ok(Observation { timeline: timeline(&body), ..Observation::of(Says::Primary) });
    }
    let (status, body) = http::fetch(connect(target).await?, target, replica).await?;
    let says = if status == 200 { Says::Replica } else { Says::Neither };
    Ok(Observation { timeline: timeline(&body), ..Observation::of(says) })
}

/// Patroni names the timeline in what it answers; others need not.
fn timeline(body: &[u8]) -> Option<u32> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    answer
        .get("timeline")?
        .as_u64()
        .and_then(|timeline| u32::try_from(timeline).ok())
        .filter(|timeline| *timeline > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timeline_is_read_where_there_is_one() {
        let patroni =
            br#"{"state": "running", "role": "primary", "timeline": 5, "xlog": {"location": 67108960}}"#;
        assert_eq!(timeline(patroni), Some(5));
        for other in ["", "I am the primary", "{}", r#"{"timeline": "5"}"#, r#"{"timeline": 0}"#] {
            assert_eq!(timeline(other.as_bytes()), None, "{other}");
        }
    }
}
