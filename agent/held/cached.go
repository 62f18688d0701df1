package held

// CachedJWTs returns how many JWT-SVIDs are cached. Some may have expired since
// they were asked for.
func (h *Held) CachedJWTs() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.jwts.order.Len()
}
