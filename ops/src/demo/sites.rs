//! Where the demo's sites are. `--sites FILE` replaces the built-in three.

use std::path::Path;

use anyhow::Context;
use serde::Deserialize;
use transfer::name::is_label;

/// One site of the demo.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DemoSite {
    /// Its name.
    pub name: String,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SitesFile {
    site: Vec<DemoSite>,
}

/// Amsterdam, Virginia, Singapore.
#[must_use]
pub fn built_in() -> Vec<DemoSite> {
    let site = |name: &str, latitude, longitude| DemoSite { name: name.to_owned(), latitude, longitude };
    vec![site("amsterdam", 52.37, 4.90), site("virginia", 39.04, -77.49), site("singapore", 1.35, 103.82)]
}

/// Reads a TOML file with three `[[site]]` tables.
///
/// # Errors
/// A message that names the file, the value and what would be right.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<DemoSite>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let file: SitesFile = toml::from_str(&text).with_context(|| path.display().to_string())?;
    anyhow::ensure!(
        file.site.len() == 3,
        "{}: {} sites; the demo's acts need exactly 3 [[site]] tables",
        path.display(),
        file.site.len()
    );
    for site in &file.site {
        let place = (-90.0..=90.0).contains(&site.latitude) && (-180.0..=180.0).contains(&site.longitude);
        anyhow::ensure!(
            is_label(&site.name),
            "{}: name = {:?}: use a-z, 0-9 and '-'",
            path.display(),
            site.name
        );
        anyhow::ensure!(
            place,
            "{}: {} is at {}, {}: latitude is -90 to 90, longitude -180 to 180",
            path.display(),
            site.name,
            site.latitude,
            site.longitude
        );
    }
    Ok(file.site)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> anyhow::Result<Vec<DemoSite>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read(file.path())
    }

    #[test]
    fn three_sites_are_wanted_and_each_mistake_is_named() {
        let site = |name: &str, latitude: f64| {
            format!("[[site]]\nname = \"{name}\"\nlatitude = {latitude:.1}\nlongitude = 1.0\n")
        };
        let good = site("a", 1.0) + &site("b", 2.0) + &site("c", 3.0);
        assert_eq!(read_text(&good).unwrap().len(), 3);
        let error = |text: &str| format!("{:#}", read_text(text).unwrap_err());
        assert!(error(&site("a", 1.0)).contains("1 sites; the demo's acts need exactly 3"));
        assert!(error(&(site("a", 1.0) + &site("B", 2.0) + &site("c", 3.0))).contains("name = \"B\""));
        assert!(
            error(&(site("a", 91.0) + &site("b", 2.0) + &site("c", 3.0))).contains("latitude is -90 to 90")
        );
        assert!(error("[[site]]\nnam = 1").contains("unknown field"));
    }
}
