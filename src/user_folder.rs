//! Folders of this user, as the XDG base directory specification names them.

use std::path::PathBuf;

/// `$variable`, or `in_home` under the home directory, and there `paceline`; relative paths do not count. `None` without a home.
pub fn user_folder(variable: &str, in_home: &str) -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(in_home)))?;
    Some(base.join("paceline"))
}
