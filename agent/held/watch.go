package held

import (
	"maps"
	"slices"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// BundleWatch says when any bundle changes, whomever it concerns. Close it.
type BundleWatch struct {
	// C receives after a change. Several changes may give one.
	C <-chan struct{}

	h *Held
	c chan struct{}
}

// WatchBundles follows all bundles that are held.
func (h *Held) WatchBundles() *BundleWatch {
	c := make(chan struct{}, 1)
	w := &BundleWatch{C: c, h: h, c: c}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watches[w] = struct{}{}
	return w
}

// Bundles returns all bundles as they are now, by name of trust domain.
func (w *BundleWatch) Bundles() []*bundle.Bundle {
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	return slices.SortedFunc(maps.Values(w.h.bundles), func(a, b *bundle.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
}

// Close ends the watch.
func (w *BundleWatch) Close() {
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	delete(w.h.watches, w)
}
