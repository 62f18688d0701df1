package registry

import (
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxDelta bounds what a subscription remembers: a stream that is further
// behind is told to look at everything.
const maxDelta = 4096

// Delta says what may have changed for a node since it was last asked: a
// superset of what has.
type Delta struct {
	// Resync: compare everything; the lists are empty.
	Resync bool
	// Entries names entries that were created, changed or deleted, and for
	// which the node is or was authorized.
	Entries []string
	// Bundles names trust domains whose bundles were made, changed or deleted.
	Bundles []spiffeid.TrustDomain
	// Revoked: some CRL or status list was made, changed or deleted.
	Revoked bool
	// NodeGone: the node was banned or deleted. It gets nothing any more.
	NodeGone bool
}

// Subscription tells a push stream what has changed for its node. Changes
// add up until they are taken, so a slow stream costs no more than a fast one.
type Subscription struct {
	// C has a value when there is something to take.
	C <-chan struct{}

	c        chan struct{}
	registry *Registry
	node     spiffeid.ID

	mu       sync.Mutex
	resync   bool
	nodeGone bool
	revoked  bool
	entries  map[string]bool
	bundles  map[spiffeid.TrustDomain]bool
}

// Subscribe starts to note changes for a node. Close the subscription when the
// stream ends. Take a view after this call and every later change is noted.
func (r *Registry) Subscribe(node spiffeid.ID) *Subscription {
	c := make(chan struct{}, 1)
	s := &Subscription{C: c, c: c, registry: r, node: node}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.subs[node] == nil {
		r.subs[node] = make(map[*Subscription]bool)
	}
	r.subs[node][s] = true
	return s
}

// Close ends the subscription.
func (s *Subscription) Close() {
	r := s.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.subs[s.node], s)
	if len(r.subs[s.node]) == 0 {
		delete(r.subs, s.node)
	}
}

// Take returns what has been noted, with the view that shows all of it and
// nothing later: whatever changes after that view will be noted.
func (s *Subscription) Take() (*View, Delta) {
	r := s.registry
	r.mu.Lock() // no marks are being made
	defer r.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	d := Delta{Resync: s.resync, NodeGone: s.nodeGone, Revoked: s.revoked}
	if !s.resync {
		for id := range s.entries {
			d.Entries = append(d.Entries, id)
		}
		for td := range s.bundles {
			d.Bundles = append(d.Bundles, td)
		}
	}
	s.resync, s.nodeGone, s.revoked, s.entries, s.bundles = false, false, false, nil, nil
	return r.told, d
}

// mark notes what concerns the node; everything, if c is nil. The registry's
// mutex is held, and told is the view that shows it.
func (s *Subscription) mark(c *concern, node spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c == nil {
		s.resync = true
		if n := s.registry.told.Node(node); n == nil || n.Banned {
			s.nodeGone = true
		}
	} else {
		s.note(c, c.nodes[node])
	}
	select {
	case s.c <- struct{}{}:
	default:
	}
}

func (s *Subscription) note(c *concern, n *nodeConcern) {
	s.revoked = s.revoked || c.revoked
	for _, td := range c.bundles {
		if s.bundles == nil {
			s.bundles = make(map[spiffeid.TrustDomain]bool)
		}
		s.bundles[td] = true
	}
	if n == nil {
		return
	}
	s.resync = s.resync || n.resync
	s.nodeGone = s.nodeGone || n.gone
	for _, id := range n.entries {
		if s.entries == nil {
			s.entries = make(map[string]bool)
		}
		s.entries[id] = true
	}
	if len(s.entries)+len(s.bundles) > maxDelta {
		s.resync = true
	}
	if s.resync {
		s.entries, s.bundles = nil, nil
	}
}

// concern is what a group of changes means to the nodes that have streams.
type concern struct {
	nodes   map[spiffeid.ID]*nodeConcern
	bundles []spiffeid.TrustDomain // concern all
	revoked bool                   // they concern all
}

type nodeConcern struct {
	resync  bool
	gone    bool
	entries []string
}

// concerned finds out whom changes concern, from the views before and after;
// nil is everyone.
// Its cost is that of the changes and of the nodes concerned, whatever the
// number of entries and streams.
func (r *Registry) concerned(old, now *View, keys []string) *concern {
	c := &concern{nodes: make(map[spiffeid.ID]*nodeConcern)}
	r.mu.Lock()
	subscribed := len(r.subs) > 0
	r.mu.Unlock()
	if !subscribed {
		return nil // whoever subscribes before wake looks at everything
	}
	node := func(id spiffeid.ID) *nodeConcern {
		n := c.nodes[id]
		if n == nil {
			n = &nodeConcern{}
			c.nodes[id] = n
		}
		return n
	}
	for _, key := range keys {
		prefix, rest, _ := strings.Cut(key, "/")
		switch prefix + "/" {
		case entryPrefix:
			was, is := old.stored(rest), now.stored(rest)
			resync := restructures(old, now, was, is)
			note := func(id spiffeid.ID) {
				n := node(id)
				n.entries = append(n.entries, rest)
				n.resync = n.resync || resync
			}
			if was != nil {
				old.holders(was, note)
			}
			if is != nil && (was == nil || reparented(was, is)) {
				now.holders(is, note)
			}
		case nodePrefix:
			id, err := spiffeid.FromString(rest)
			if err != nil {
				continue
			}
			was, is := old.Node(id), now.Node(id)
			switch {
			case is == nil || is.Banned:
				node(id).gone = true
			case was == nil || was.Banned || !was.Selectors.Equal(is.Selectors):
				node(id).resync = true
			}
		case bundlePrefix:
			if td, err := spiffeid.TrustDomainFromString(rest); err == nil {
				c.bundles = append(c.bundles, td)
			}
		case crlPrefix, statusPrefix:
			c.revoked = true
		}
	}
	return c
}

// reparented reports whether other nodes may hold the entry than before.
func reparented(was, is *storedEntry) bool {
	return was.ParentID != is.ParentID || was.IsAlias() && !was.Selectors.Equal(is.Selectors)
}

// restructures reports whether the change of an entry may change which other
// entries nodes are authorized for: it has children, and was made, deleted,
// moved, renamed or given another end, which may lie in the past or have lain
// there.
func restructures(old, now *View, was, is *storedEntry) bool {
	if was != nil && is != nil && !reparented(was, is) && was.SPIFFEID == is.SPIFFEID && was.ExpiresAt.Equal(is.ExpiresAt) {
		return false
	}
	hasChildren := func(v *View, e *storedEntry) bool {
		if e == nil {
			return false
		}
		for range v.EntriesByParent(e.SPIFFEID) {
			return true
		}
		return false
	}
	return hasChildren(old, was) || hasChildren(now, was) || hasChildren(old, is) || hasChildren(now, is)
}

// holders calls note with the ID of every node that is or could be authorized
// for an entry, or whose alias it is; with some of them twice.
func (v *View) holders(e *storedEntry, note func(spiffeid.ID)) {
	if e.IsAlias() {
		v.matching(e, note)
		return
	}
	always := time.Time{} // before any end: an ancestor that has ended concerns its nodes still
	v.ancestors(e.ParentID, always, func(p spiffeid.ID, named *storedEntry) bool {
		switch {
		case named == nil:
			note(p)
		case named.IsAlias():
			v.matching(named, note)
		}
		return true
	})
}

// matching calls note with the ID of every node that matches an alias.
func (v *View) matching(alias *storedEntry, note func(spiffeid.ID)) {
	first := alias.Selectors[0]
	v.bySelector.Ascend(nodeSelector{first, &Node{}}, func(x nodeSelector) bool {
		if x.selector != first {
			return false
		}
		if alias.Selectors.SubsetOf(x.node.match) {
			note(x.node.ID)
		}
		return true
	})
}
