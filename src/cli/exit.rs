//! How a command ends: an exit code for scripts, a sentence and a next step for people.

use std::fmt;
use std::process::ExitCode;

/// Documented in docs/CLI.md and in `pgvigil --help`; scripts rely on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    /// It was tried and did not succeed, or the answer to the question is no.
    Failed = 1,
    /// Wrong command line or configuration: nothing was tried.
    Usage = 2,
    /// Nobody answered.
    Unreachable = 3,
    /// The cluster said no; nothing was changed.
    Refused = 4,
    /// Begun, and what came of it is not known (S11).
    Unknown = 5,
}

#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    /// What to do next; may be empty.
    pub hint: String,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), hint: hint.into() }
    }

    pub fn failed(message: impl Into<String>, hint: impl Into<String>) -> Failure {
        Failure::new(Exit::Failed, message, hint)
    }

    /// Errors go where their reader looks: a JSON object on standard output, or a sentence on standard error.
    pub fn report(&self, json: bool) -> ExitCode {
        if json {
            let body = serde_json::json!({"error": self.message, "hint": self.hint, "exit": self.exit as u8});
            say(format_args!("{body:#}\n"));
        } else {
            eprintln!("pgvigil: {self}");
        }
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if self.hint.is_empty() { Ok(()) } else { write!(f, "\n  {}", self.hint) }
    }
}

impl From<crate::config::ConfigError> for Failure {
    fn from(error: crate::config::ConfigError) -> Failure {
        // Its one line holds the remedy already.
        Failure::new(Exit::Usage, error.to_string(), "")
    }
}

/// Writes to standard output; a reader that went away (`| head`) is not our error.
pub fn say(text: fmt::Arguments<'_>) {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    let _ = out.write_fmt(text).and_then(|()| out.flush());
}
