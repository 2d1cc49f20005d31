/* What Limosa uses of DPDK. Inline functions and macros have no symbol to link to, so wrapper.c makes one of each. */
#include <rte_dev.h>
#include <rte_eal.h>
#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>
#include <rte_mempool.h>

uint16_t limosa_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **packets, uint16_t count);
uint16_t limosa_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **packets, uint16_t count);
struct rte_mbuf *limosa_alloc(struct rte_mempool *pool);
void limosa_free(struct rte_mbuf *packet);
/* The place behind the data, `len` bytes longer from now on; null when it does not fit. */
char *limosa_append(struct rte_mbuf *packet, uint16_t len);
/* Puts the tag that a device took off back into the frame; negative when there is no room. */
int limosa_vlan_insert(struct rte_mbuf **packet);
int limosa_errno(void);
uint64_t limosa_cycles(void);

/* Macros with casts that bindgen cannot evaluate. */
static const uint64_t LIMOSA_RX_VLAN_STRIPPED = RTE_MBUF_F_RX_VLAN_STRIPPED;
static const uint64_t LIMOSA_RX_L4_CKSUM_MASK = RTE_MBUF_F_RX_L4_CKSUM_MASK;
static const uint64_t LIMOSA_RX_L4_CKSUM_NONE = RTE_MBUF_F_RX_L4_CKSUM_NONE;
static const uint64_t LIMOSA_TX_FAST_FREE = RTE_ETH_TX_OFFLOAD_MBUF_FAST_FREE;
static const uint16_t LIMOSA_HEADROOM = RTE_PKTMBUF_HEADROOM;
static const uint16_t LIMOSA_LINK_UP = RTE_ETH_LINK_UP;
