//! `[planner]`: where a planner tells its intervals.

use super::keys::{self, Section};
use super::layers::{Layers, Of};
use super::words::PlannerNames;
use super::{PathBuf, Planner, Purpose};

/// The settings, if a planner is listened to at all.
pub(super) fn planner(layers: &mut Layers, purpose: Purpose) -> Option<Planner> {
    if purpose != Purpose::Serve {
        return None;
    }
    let names = layers.word(
        &keys::PLANNER_NAMES,
        PlannerNames::parse,
        PlannerNames::Both,
    );
    let Some((socket, at)) = layers.text(&keys::PLANNER_SOCKET, Of::Once) else {
        let table = layers.main.table(Section::Planner, 0);
        let refused =
            |table: &&super::raw::Table| !table.refused.contains(&keys::PLANNER_SOCKET.name);
        if let Some(at) = table.filter(refused).map(|table| table.at.clone()) {
            let what = "[planner] has no socket, so no planner is listened to".to_owned();
            layers.error(&at, what, "write socket = \"/run/corelane/planner.sock\"");
        }
        return None;
    };
    if socket.len() >= corelane_gpu_mem::paths::PATH_BYTES_MAX {
        let what = format!("socket has {} bytes, and 107 are allowed", socket.len());
        layers.error(&at, what, "write a shorter path");
    }
    Some(Planner {
        socket: PathBuf::from(socket),
        names,
    })
}
