//! What the benches share.

use serde::Serialize;

/// Least, median and greatest of some figures.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Spread {
    /// The least.
    pub least: f64,
    /// The one in the middle; of an even number the greater of the two.
    pub median: f64,
    /// The greatest.
    pub greatest: f64,
}

impl Spread {
    /// `None`: there are none.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut all: Vec<f64> = figures.into_iter().collect();
        all.sort_by(f64::total_cmp);
        let (least, greatest) = all.first().copied().zip(all.last().copied())?;
        Some(Self { least, median: all[all.len() / 2], greatest })
    }
}
