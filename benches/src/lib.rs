//! What the benches share.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Writes a report, as JSON, and says where it is.
///
/// # Errors
/// When it cannot be written.
pub fn write_report(path: &Path, report: &impl Serialize) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, serde_json::to_string_pretty(report)? + "\n")
        .with_context(|| format!("{} cannot be written", path.display()))?;
    println!("\nwritten to {}", path.display());
    Ok(())
}

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
