//! What is wrong with a configuration: file, place, field, value, remedy, in one line.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    pub file: PathBuf,
    /// Line and column, counted from 1.
    pub place: Option<(usize, usize)>,
    /// Dotted: `lease.ttl`, `members[1].host`.
    pub field: Option<String>,
    pub problem: String,
    /// What to write or do instead; empty when the problem says it.
    pub remedy: String,
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some((line, column)) = self.place {
            write!(f, ":{line}:{column}")?;
        }
        if let Some(field) = &self.field {
            write!(f, ": {field}")?;
        }
        write!(f, ": {}", self.problem)?;
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

pub(super) fn read_file(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "name the file with --config; docs/pgvigil.sample.toml shows a complete one".to_owned()
            }
            std::io::ErrorKind::PermissionDenied => "run as the user of the agent, or let this user read it".to_owned(),
            _ => String::new(),
        };
        ConfigError {
            file: path.to_owned(),
            place: None,
            field: None,
            problem: format!("read configuration: {error}"),
            remedy,
        }
    })
}

/// The text of one file: makes errors that point into it.
pub(super) struct Source<'a> {
    pub file: &'a Path,
    pub text: &'a str,
}

impl Source<'_> {
    /// An error of a field that is in the file, or is missing from it.
    pub fn field(&self, field: &str, problem: impl Into<String>, remedy: impl Into<String>) -> ConfigError {
        ConfigError {
            file: self.file.to_owned(),
            place: self.span_of(field).map(|span| self.line_and_column(span.start)),
            field: Some(field.to_owned()),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    /// What toml or serde found; serde's words for unknown keys become a sentence with the nearest right one.
    pub fn toml(&self, error: &toml::de::Error) -> ConfigError {
        let place = error.span().map(|span| self.line_and_column(span.start));
        let field = error.span().and_then(|span| self.field_at(&span));
        let (problem, remedy) = match UnknownKey::read(error.message()) {
            Some(unknown) => {
                let section = field.as_deref().and_then(|f| f.rsplit_once('.')).map_or("", |(section, _)| section);
                (format!("`{}` is not a key of {}", unknown.key, section_name(section)), unknown.remedy(section))
            }
            None => (first_line(error.message()), String::new()),
        };
        ConfigError { file: self.file.to_owned(), place, field, problem, remedy }
    }

    fn line_and_column(&self, offset: usize) -> (usize, usize) {
        // An offset that is no character boundary cannot come from the parser; if it does, the start is named.
        let before = self.text.get(..offset).unwrap_or("");
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or("").chars().count() + 1;
        (line, column)
    }

    /// The dotted path of the innermost key or value that holds `span`.
    fn field_at(&self, span: &Range<usize>) -> Option<String> {
        let document = DeTable::parse(self.text).ok()?;
        let mut found = None;
        walk_table(document.get_ref(), "", &mut |path, range| {
            // Later visits are deeper: the last one that holds the span is the innermost.
            if range.start <= span.start && span.end <= range.end {
                found = Some(path.to_owned());
            }
        });
        found
    }

    fn span_of(&self, field: &str) -> Option<Range<usize>> {
        let document = DeTable::parse(self.text).ok()?;
        let mut found = None;
        walk_table(document.get_ref(), "", &mut |path, range| {
            if path == field && found.is_none() {
                found = Some(range);
            }
        });
        found
    }
}

/// Visits each key with its span, then its value's: depth first, parents before children.
fn walk_table(table: &DeTable<'_>, prefix: &str, visit: &mut dyn FnMut(&str, Range<usize>)) {
    for (key, value) in table {
        let path = if prefix.is_empty() { key.get_ref().to_string() } else { format!("{prefix}.{}", key.get_ref()) };
        visit(&path, key.span());
        visit(&path, value.span());
        walk_value(value.get_ref(), &path, visit);
    }
}

fn walk_value(value: &DeValue<'_>, path: &str, visit: &mut dyn FnMut(&str, Range<usize>)) {
    match value {
        DeValue::Table(table) => walk_table(table, path, visit),
        DeValue::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}[{index}]");
                visit(&path, item.span());
                walk_value(item.get_ref(), &path, visit);
            }
        }
        DeValue::String(_) | DeValue::Integer(_) | DeValue::Float(_) | DeValue::Boolean(_) | DeValue::Datetime(_) => {}
    }
}

/// serde's "unknown field `x`, expected one of `a`, `b`", taken apart.
struct UnknownKey<'a> {
    key: &'a str,
    expected: Vec<&'a str>,
}

impl<'a> UnknownKey<'a> {
    fn read(message: &'a str) -> Option<UnknownKey<'a>> {
        let mut quoted = message.strip_prefix("unknown field ")?.split('`').skip(1).step_by(2);
        Some(UnknownKey { key: quoted.next()?, expected: quoted.collect() })
    }

    fn remedy(&self, section: &str) -> String {
        if let Some(secret) = self.expected.iter().find(|k| k.strip_suffix("_file") == Some(self.key)) {
            return format!(
                "secrets do not stand in this file: write `{secret}` with the path of a file that holds it"
            );
        }
        if let Some(near) = nearest(self.key, self.expected.iter().copied()) {
            return format!("did you mean `{near}`?");
        }
        // Right key, wrong section.
        let elsewhere = super::keys::KEYS
            .iter()
            .find(|known| known.name.rsplit('.').next() == Some(self.key) && known.name != self.key);
        if let Some(known) = elsewhere {
            return format!("did you mean `{}`?", known.name);
        }
        let top = section.is_empty().then(|| super::keys::KEYS.iter().find(|k| k.name == self.key)).flatten();
        match top {
            Some(known) => format!("did you mean `{}`?", known.name),
            None => format!("it takes {}", self.expected.join(", ")),
        }
    }
}

fn section_name(section: &str) -> String {
    if section.is_empty() { "the file's top level".to_owned() } else { format!("[{section}]") }
}

/// The candidate that looks most like `word`, if any does: at most one wrong, missing, added or exchanged letter in three.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = word.chars().count().div_ceil(3);
    candidates
        .map(|candidate| (strsim::osa_distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

fn first_line(message: &str) -> String {
    message.lines().collect::<Vec<_>>().join(", ")
}
