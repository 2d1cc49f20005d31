#include "wrapper.h"

#include <rte_cycles.h>
#include <rte_ether.h>

uint16_t limosa_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **packets, uint16_t count)
{
	return rte_eth_rx_burst(port, queue, packets, count);
}

uint16_t limosa_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **packets, uint16_t count)
{
	return rte_eth_tx_burst(port, queue, packets, count);
}

struct rte_mbuf *limosa_alloc(struct rte_mempool *pool)
{
	return rte_pktmbuf_alloc(pool);
}

void limosa_free(struct rte_mbuf *packet)
{
	rte_pktmbuf_free(packet);
}

char *limosa_append(struct rte_mbuf *packet, uint16_t len)
{
	return rte_pktmbuf_append(packet, len);
}

int limosa_vlan_insert(struct rte_mbuf **packet)
{
	return rte_vlan_insert(packet);
}

int limosa_errno(void)
{
	return rte_errno;
}

uint64_t limosa_cycles(void)
{
	return rte_rdtsc();
}
