//! `pgvigil status [--watch]`

use std::io::IsTerminal;
use std::time::Duration;

use comfy_table::{Table, presets};
use serde::Deserialize;
use serde_json::Value;

use super::{Exit, Failure, Global, say};
use crate::client::Answer;

#[derive(clap::Args)]
pub struct Arguments {
    /// Show it again and again, until Ctrl-C
    #[arg(long, short)]
    watch: bool,
    /// Seconds between two looks with --watch
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    every: f64,
}

pub fn run(global: &Global, arguments: &Arguments) -> Result<Exit, Failure> {
    let client = super::contact::client(global)?;
    let every = Duration::try_from_secs_f64(arguments.every.clamp(0.1, 3_600.0)).unwrap_or(Duration::from_secs(1));
    super::runtime()?.block_on(async {
        loop {
            let answer = client.get("/v1/status").await.and_then(Answer::success);
            if !arguments.watch {
                return show(global, &answer?);
            }
            let clear = if std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            say(format_args!("{clear}"));
            // While watching, silence is something to watch too.
            if let Err(failure) = answer.map_err(Failure::from).and_then(|body| show(global, &body)) {
                say(format_args!("{failure}\n"));
            }
            tokio::time::sleep(every).await;
        }
    })
}

fn show(global: &Global, body: &Value) -> Result<Exit, Failure> {
    let overview = Overview::deserialize(body).map_err(|error| {
        Failure::failed(format!("read the agent's answer: {error}"), "is the agent of another version?")
    })?;
    if global.json {
        say(format_args!("{body:#}\n"));
    } else {
        let text = overview.render();
        say(format_args!("{}", if colours() { paint(&text) } else { text }));
    }
    let has_primary = overview.members.iter().any(|m| m.role == "primary");
    Ok(if has_primary { Exit::Ok } else { Exit::Failed })
}

/// The part of `/v1/status` that the table shows. What an agent of another version leaves out is shown as unknown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Overview {
    pub cluster: String,
    pub leader: Option<String>,
    pub term: Option<u64>,
    pub timeline: Option<u32>,
    pub durability: Option<String>,
    pub reason: Option<String>,
    pub warnings: Vec<String>,
    pub members: Vec<MemberRow>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct MemberRow {
    pub name: String,
    pub role: String,
    pub state: String,
    pub timeline: Option<u32>,
    pub lag_bytes: Option<u64>,
    pub sync: Option<Value>,
    pub tags: Value,
    pub reason: Option<String>,
    pub host: String,
    pub port: u16,
}

impl Overview {
    pub fn render(&self) -> String {
        let mut head = format!("cluster {}", self.cluster);
        if let Some(leader) = &self.leader {
            head.push_str(&format!(", leader {leader}"));
        }
        for (name, value) in [("term", self.term), ("timeline", self.timeline.map(u64::from))] {
            if let Some(value) = value {
                head.push_str(&format!(", {name} {value}"));
            }
        }
        if let Some(durability) = &self.durability {
            head.push_str(&format!(", durability {durability}"));
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["MEMBER", "ROLE", "STATE", "TIMELINE", "LAG", "SYNC", "TAGS", "REASON"]);
        for member in &self.members {
            table.add_row([
                member.name.clone(),
                member.role.clone(),
                member.state.clone(),
                member.timeline.map_or_else(|| "-".to_owned(), |t| t.to_string()),
                member.lag_bytes.map_or_else(|| "-".to_owned(), bytes),
                member.sync.as_ref().map_or_else(|| "-".to_owned(), word),
                tags(&member.tags),
                member.reason.clone().unwrap_or_default(),
            ]);
        }
        let mut text = format!("{head}\n");
        for line in table.to_string().lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        for warning in self.warnings.iter().chain(&self.reason) {
            text.push_str(&format!("{warning}\n"));
        }
        text
    }
}

/// Bytes in the largest unit that keeps two digits of meaning.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count;
    let mut unit = 0;
    while value >= 10_240 && unit + 1 < UNITS.len() {
        value /= 1_024;
        unit += 1;
    }
    format!("{value} {}", UNITS[unit])
}

fn word(value: &Value) -> String {
    match value {
        Value::Bool(true) => "sync".to_owned(),
        Value::Bool(false) | Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn tags(tags: &Value) -> String {
    let Some(tags) = tags.as_object() else { return String::new() };
    let mut shown = Vec::new();
    for (name, value) in tags {
        match value {
            Value::Bool(true) => shown.push(name.clone()),
            Value::Bool(false) | Value::Null => {}
            Value::Object(custom) => shown.extend(custom.iter().map(|(k, v)| format!("{k}={}", word(v)))),
            // 1 is what everybody has.
            Value::Number(number) if name == "failover_priority" && number.as_u64() == Some(1) => {}
            other => shown.push(format!("{name}={}", word(other))),
        }
    }
    shown.join(" ")
}

/// Only for a person's terminal, and not where NO_COLOR asks for none.
pub fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Colours words after the table is laid out: escape sequences in cells would count as width.
pub fn paint(text: &str) -> String {
    let mut painted = String::with_capacity(text.len() + 64);
    for line in text.lines() {
        let line = line
            .replacen(" primary ", " \x1b[1;32mprimary\x1b[0m ", 1)
            .replacen(" standby ", " \x1b[36mstandby\x1b[0m ", 1)
            .replacen(" none ", " \x1b[31mnone\x1b[0m ", 1);
        painted.push_str(&line);
        painted.push('\n');
    }
    painted
}
