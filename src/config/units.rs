//! Durations and sizes as people write them: a whole number with a unit, `"8s"`, `"700ms"`, `"16MB"`.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

const DURATION_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("min", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
/// PostgreSQL's units: multiples of 1024, and its spelling.
const SIZE_UNITS: [(&str, u64); 5] = [("B", 1), ("kB", 1 << 10), ("MB", 1 << 20), ("GB", 1 << 30), ("TB", 1 << 40)];

const DURATION_HELP: &str = r#"write ms, s, min, h or d, for example "8s" or "700ms""#;
const SIZE_HELP: &str = r#"write B, kB, MB, GB or TB, for example "16MB" or "1GB""#;

/// A duration in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

/// A number of bytes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

pub fn duration(text: &str) -> Result<Duration, String> {
    quantity(text, &DURATION_UNITS, DURATION_HELP).map(Duration::from_millis)
}

pub fn size(text: &str) -> Result<u64, String> {
    quantity(text, &SIZE_UNITS, SIZE_HELP)
}

fn quantity(text: &str, units: &[(&str, u64)], help: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let digits = trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = (&trimmed[..digits], trimmed[digits..].trim_start());
    if number.is_empty() {
        return Err(format!("`{text}` does not begin with a number; {help}"));
    }
    if unit.starts_with(['.', ',']) {
        return Err(format!("`{text}` is not a whole number; take a smaller unit: {help}"));
    }
    if unit.is_empty() {
        return Err(format!("`{text}` has no unit; {help}"));
    }
    let Some((_, factor)) = units.iter().find(|(name, _)| *name == unit) else {
        let meant = nearest_unit(unit, units).map(|u| format!(" (did you mean `{number}{u}`?)")).unwrap_or_default();
        return Err(format!("`{text}` has the unknown unit `{unit}`{meant}; {help}"));
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(*factor))
        .ok_or_else(|| format!("`{text}` is larger than can be counted; take a smaller value"))
}

/// Another spelling of a unit that we know: `sec`, `Seconds`, `mb`, `MiB`, `m`.
fn nearest_unit<'a>(unit: &str, units: &[(&'a str, u64)]) -> Option<&'a str> {
    let lower = unit.to_ascii_lowercase();
    let ours = match lower.as_str() {
        "sec" | "secs" | "second" | "seconds" => "s",
        "msec" | "msecs" | "millis" | "millisecond" | "milliseconds" => "ms",
        "m" | "mins" | "minute" | "minutes" => "min",
        "hr" | "hrs" | "hour" | "hours" => "h",
        "day" | "days" => "d",
        "byte" | "bytes" => "B",
        "k" | "kib" => "kB",
        "mib" => "MB",
        "g" | "gib" => "GB",
        "t" | "tib" => "TB",
        other => other,
    };
    let ours = if ours == "min" && units[0].0 == "B" { "MB" } else { ours };
    units.iter().map(|(name, _)| *name).find(|name| name.eq_ignore_ascii_case(ours))
}

/// As it would be written in the file: the largest unit that divides it.
pub fn show_duration(span: Duration) -> String {
    show(u64::try_from(span.as_millis()).unwrap_or(u64::MAX), &DURATION_UNITS)
}

pub fn show_size(bytes: u64) -> String {
    show(bytes, &SIZE_UNITS)
}

fn show(value: u64, units: &[(&str, u64)]) -> String {
    let (unit, factor) =
        units.iter().rev().find(|(_, factor)| value >= *factor && value.is_multiple_of(*factor)).unwrap_or(&units[0]);
    format!("{}{unit}", value / factor)
}

// === serde ===

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        deserializer.deserialize_any(Quantity {
            what: "a duration",
            help: DURATION_HELP,
            parse: |t| duration(t).map(Span),
        })
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        deserializer.deserialize_any(Quantity { what: "a size", help: SIZE_HELP, parse: |t| size(t).map(Size) })
    }
}

/// Takes strings, and answers bare numbers with what is missing.
struct Quantity<T> {
    what: &'static str,
    help: &'static str,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> Visitor<'_> for Quantity<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with its unit in quotes", self.what)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        Err(E::custom(format!("`{number}` has no unit; {}", self.help)))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        Err(E::custom(format!("`{number}` has no unit; {}", self.help)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_units_are_read_and_shown_again() {
        for (text, ms) in
            [("8s", 8_000), ("700ms", 700), ("10min", 600_000), ("2h", 7_200_000), ("0s", 0), (" 3 s ", 3_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for (text, bytes) in [("16MB", 16 << 20), ("1kB", 1024), ("1B", 1), ("2TB", 2 << 40)] {
            assert_eq!(size(text), Ok(bytes), "{text}");
            assert_eq!(show_size(bytes), text);
        }
        assert_eq!(show_duration(Duration::from_secs(600)), "10min");
        assert_eq!(show_duration(Duration::from_millis(1_500)), "1500ms");
    }

    #[test]
    fn wrong_units_are_named_with_the_right_one() {
        for (text, part) in [
            ("8", "has no unit"),
            ("8sec", "did you mean `8s`"),
            ("5m", "did you mean `5min`"),
            ("1.5s", "not a whole number"),
            ("s", "does not begin with a number"),
            ("-1s", "does not begin with a number"),
            ("99999999999999999999s", "larger than can be counted"),
        ] {
            let message = duration(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
        for (text, part) in
            [("16mb", "did you mean `16MB`"), ("1MiB", "did you mean `1MB`"), ("5m", "`5MB`"), ("1s", "kB")]
        {
            let message = size(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
