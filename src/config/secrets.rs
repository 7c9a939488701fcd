//! Passwords and tokens: from a file that not everybody can read, or from the environment. Never from the configuration.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::error::Source;
use super::{ConfigError, Environment, Secret};

/// The secret of `field` (`etcd.password_file`); the environment variable goes before the file. `None`: neither is given.
pub(super) fn read(
    source: &Source<'_>,
    environment: Environment<'_>,
    field: &str,
    variable: &str,
    file: Option<&Path>,
) -> Result<Option<Secret>, ConfigError> {
    if let Some(value) = environment(variable) {
        return Ok(Some(Secret::new(value)));
    }
    let Some(file) = file else { return Ok(None) };
    let shown = file.display();
    let text = std::fs::read_to_string(file).map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::NotFound => format!("write the secret into it, mode 0600, or set {variable}"),
            std::io::ErrorKind::PermissionDenied => "let the agent's user read it".to_owned(),
            _ => String::new(),
        };
        source.field(field, format!("read {shown}: {error}"), remedy)
    })?;
    let mode = std::fs::metadata(file)
        .map_err(|error| source.field(field, format!("read the mode of {shown}: {error}"), ""))?
        .permissions()
        .mode()
        & 0o7777;
    if mode & 0o007 != 0 {
        let problem = format!("{shown} has mode {mode:04o}: everybody on this machine can read it");
        return Err(source.field(field, problem, format!("run `chmod 0600 {shown}`")));
    }
    let secret = text.trim_end_matches(['\n', '\r']);
    if secret.is_empty() {
        return Err(source.field(field, format!("{shown} is empty"), "write the secret into it"));
    }
    if secret.contains(['\n', '\r', '\0']) {
        return Err(source.field(field, format!("{shown} holds more than one line"), "one line, nothing else"));
    }
    Ok(Some(Secret::new(secret)))
}
