//! Packets and the pools that their buffers come from.

use std::ffi::CString;
use std::fmt;
use std::ptr::NonNull;

use dpdk_sys::{rte_mbuf, rte_mempool};

use crate::eal::{Eal, last_error};
use crate::error::PoolError;

/// Buffers that a processor may keep at hand without asking the pool.
const CACHE_LEN: u32 = 256;

/// A pool of buffers of one length; lives as long as the process. Copies are the same pool.
#[derive(Clone, Copy)]
pub struct Pool {
    pool: NonNull<rte_mempool>,
    room: u16,
}

// SAFETY: DPDK's pools are made for any number of threads; the cache of a processor is used only by the thread that
// DPDK has bound to it, and threads that it does not know use none.
unsafe impl Send for Pool {}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("room", &self.room).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool of `buffers` for frames of up to `frame_len` bytes.
    ///
    /// # Errors
    /// [`PoolError`].
    pub fn new(_: &Eal, name: &str, buffers: u32, frame_len: u16) -> Result<Self, PoolError> {
        let c_name = CString::new(name).ok().filter(|_| (1..=25).contains(&name.len()));
        let c_name = c_name.ok_or_else(|| PoolError::Name(name.to_owned()))?;
        // Drivers want whole kilobytes (vhost and memif) and room in front (virtio writes its header there).
        let len = frame_len.next_multiple_of(1024).max(2048).saturating_add(dpdk_sys::LIMOSA_HEADROOM);
        let cache = CACHE_LEN.min(buffers * 2 / 3);
        // SAFETY: DPDK was started; the name ends in zero and is copied.
        let pool = unsafe {
            dpdk_sys::rte_pktmbuf_pool_create(
                c_name.as_ptr(),
                buffers,
                cache,
                0,
                len,
                -1, /* any socket */
            )
        };
        let pool = NonNull::new(pool).ok_or_else(|| PoolError::Memory {
            buffers,
            len,
            reason: last_error(),
            // Headers of buffer and pool, and what is lost at the ends of pages; the rest is DPDK's own.
            needed_mb: ((u64::from(buffers) * (u64::from(len) + 320)) >> 20) + 64,
        })?;
        Ok(Self { pool, room: len - dpdk_sys::LIMOSA_HEADROOM })
    }

    /// A packet with a copy of `bytes`; none when no buffer is free or it does not fit.
    #[must_use]
    pub fn packet(&self, bytes: &[u8]) -> Option<Mbuf> {
        let len = u16::try_from(bytes.len()).ok()?;
        // SAFETY: the pool is never taken down.
        let packet = Mbuf(NonNull::new(unsafe { dpdk_sys::limosa_alloc(self.pool.as_ptr()) })?);
        // SAFETY: the packet is ours and has one segment.
        let place = NonNull::new(unsafe { dpdk_sys::limosa_append(packet.0.as_ptr(), len) })?;
        // SAFETY: `place` has `len` bytes that belong to the new packet alone.
        unsafe { place.as_ptr().cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Some(packet)
    }

    /// Buffers that are free. Looks at every processor's cache: not for every burst.
    #[must_use]
    pub fn available(&self) -> u32 {
        // SAFETY: the pool is never taken down.
        unsafe { dpdk_sys::rte_mempool_avail_count(self.pool.as_ptr()) }
    }

    pub(crate) fn as_ptr(self) -> *mut rte_mempool {
        self.pool.as_ptr()
    }

    /// Longest frame that fits a buffer.
    #[must_use]
    pub fn room(&self) -> u16 {
        self.room
    }
}

/// A packet in one buffer, whose only owner this is.
#[repr(transparent)]
pub struct Mbuf(NonNull<rte_mbuf>);

// SAFETY: a packet has one owner, and its buffer goes back to a pool that any thread may use.
unsafe impl Send for Mbuf {}

impl fmt::Debug for Mbuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mbuf").field(&self.data()).finish()
    }
}

impl Drop for Mbuf {
    fn drop(&mut self) {
        // SAFETY: we own it, and it is not used again.
        unsafe { dpdk_sys::limosa_free(self.0.as_ptr()) };
    }
}

impl Mbuf {
    fn header(&self) -> &rte_mbuf {
        // SAFETY: we own it, and C changes it only when we hand it over.
        unsafe { self.0.as_ref() }
    }

    /// The frame.
    #[must_use]
    #[inline]
    pub fn data(&self) -> &[u8] {
        let header = self.header();
        // SAFETY: DPDK keeps `data_off + data_len` within the buffer, which belongs to this packet alone, and was
        // written when the pool was made.
        unsafe {
            let start = header.buf_addr.cast::<u8>().add(usize::from(header.data_off));
            std::slice::from_raw_parts(start, usize::from(header.data_len))
        }
    }

    /// The frame, to be rewritten.
    #[inline]
    pub fn data_mut(&mut self) -> &mut [u8] {
        let header = self.header();
        // SAFETY: as in `data`, and the borrow of `self` is exclusive.
        unsafe {
            let start = header.buf_addr.cast::<u8>().add(usize::from(header.data_off));
            std::slice::from_raw_parts_mut(start, usize::from(header.data_len))
        }
    }

    /// Cuts the frame to a length; one that is shorter stays as it is.
    pub fn truncate(&mut self, len: usize) {
        let len = u16::try_from(len).unwrap_or(u16::MAX);
        // SAFETY: we own it, and a packet of ours is one segment; a smaller length stays within its buffer.
        let header = unsafe { self.0.as_mut() };
        if len < header.data_len {
            header.data_len = len;
            header.pkt_len = u32::from(len);
        }
    }

    /// Frees many at once.
    pub fn free(packets: &mut Vec<Self>) {
        let count = u32::try_from(packets.len()).unwrap_or(u32::MAX);
        // SAFETY: an `Mbuf` is a pointer that is not null; the vector forgets them, so none is freed twice.
        unsafe {
            packets.set_len(packets.len() - count as usize);
            dpdk_sys::rte_pktmbuf_free_bulk(packets.as_mut_ptr().add(packets.len()).cast(), count);
        }
    }

    /// Whether the sender left the checksum of the transport header to us.
    #[must_use]
    pub fn is_checksum_partial(&self) -> bool {
        self.header().ol_flags & dpdk_sys::LIMOSA_RX_L4_CKSUM_MASK == dpdk_sys::LIMOSA_RX_L4_CKSUM_NONE
    }

    /// Whether the device took the VLAN tag off.
    pub(crate) fn is_untagged(&self) -> bool {
        self.header().ol_flags & dpdk_sys::LIMOSA_RX_VLAN_STRIPPED != 0
    }

    /// Puts the VLAN tag back; gives up the packet when it has no room.
    pub(crate) fn tagged(self) -> Option<Self> {
        let mut packet = self.0.as_ptr();
        // SAFETY: we own the packet; on success the pointer that comes back is ours in its place, else still the old.
        if unsafe { dpdk_sys::limosa_vlan_insert(&mut packet) } != 0 {
            return None;
        }
        std::mem::forget(self);
        NonNull::new(packet).map(Self)
    }

    /// Length over all segments, and how many they are.
    pub(crate) fn extent(&self) -> (u32, u16) {
        (self.header().pkt_len, self.header().nb_segs)
    }

    /// Asks for the beginning of the frame before it is read.
    #[inline]
    pub(crate) fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        {
            let header = self.header();
            let start = header.buf_addr.cast::<i8>().wrapping_add(usize::from(header.data_off));
            // SAFETY: a hint to the processor; any address is allowed.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(start) };
        }
    }
}
