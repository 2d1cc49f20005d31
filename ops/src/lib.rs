//! Limosa: live flows move between sites without stopping. This package joins the parts into one binary.

pub mod site;
