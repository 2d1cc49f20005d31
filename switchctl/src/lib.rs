//! Rules of a site, OpenFlow, and the embedded switch.
