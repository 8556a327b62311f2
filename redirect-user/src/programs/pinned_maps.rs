//! Maps that are there already have to be those that the programs were built for.

use anyhow::{Context, Result, ensure};
use aya::maps::{MapInfo, MapType};
use aya_obj::generated::bpf_map_type;
use aya_obj::{Map, Object};

use crate::pins::{self, Pins};
use crate::sys::bpf::Kind;
use crate::tables;

/// Type, and sizes of keys and values in bytes.
type Layout = (MapType, u32, u32);

/// Refuses pinned maps that are not like those of the object. The verifier would refuse the programs, in words about registers.
pub(super) fn compare(object: &[u8], pins: &Pins) -> Result<()> {
    let object = Object::parse(object).context("reading the eBPF object")?;
    for name in tables::KEPT.iter().chain(tables::RENEWED) {
        let path = pins.map(name);
        if pins::open(&path, Kind::Map)?.is_none() {
            continue;
        }
        let map = object.maps.get(*name);
        let wanted = layout(map.with_context(|| format!("the eBPF object has no map {name}"))?)?;
        let info = MapInfo::from_pin(&path)?;
        let found: Layout = (info.map_type()?, info.key_size(), info.value_size());
        ensure!(
            found == wanted,
            "{} is {}, and has to be {}: somebody else has pinned it",
            path.display(),
            in_words(found),
            in_words(wanted)
        );
    }
    Ok(())
}

fn layout(map: &Map) -> Result<Layout> {
    let kind = bpf_map_type::try_from(map.map_type())
        .ok()
        .context("a map of the eBPF object is of no known type")?;
    Ok((MapType::try_from(kind)?, map.key_size(), map.value_size()))
}

fn in_words((kind, key, value): Layout) -> String {
    format!("{kind:?} with keys of {key} and values of {value} bytes")
}
