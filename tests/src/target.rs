//! What the set-up and builds leave in the target directory.

use std::{
    env,
    path::{Path, PathBuf},
};

/// What is at that place in the target directory that this program is in, or else in the workspace's.
pub fn in_target(place: &str) -> Option<PathBuf> {
    let test = env::current_exe().unwrap();
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let mut places = test
        .ancestors()
        .chain([workspace.as_path()])
        .map(|directory| directory.join(place));
    places.find(|path| path.exists())
}
