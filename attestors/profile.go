package attestors

// Profile is what an attestor of nodes is worth, whatever its configuration. Each
// attestor's package has one.
type Profile struct {
	Name     string   // in configurations, of the selectors, and what agents' IDs begin with
	Strength Strength // the kind of thing that one needs to pass for a node
	// Needed is what one needs to pass for a node, or how one comes by it: the
	// easiest way, with the configuration as it should be.
	Needed    string
	Selectors []Form
	Page      string // of the documentation, a path in the repository
}

// Form is a kind of selector that nodes get.
type Form struct {
	Value   string // of the selector, after its type; what varies is in capitals
	Meaning string
}

// Strength says which kind of thing one needs to pass for a node. A greater one is
// harder to come by.
type Strength int

// From the weakest to the strongest. Their meaning is in [Strength.Meaning].
const (
	Unknown Strength = iota
	Network
	Bearer
	Key
	Hardware
)

var strengths = [...]struct{ name, meaning string }{
	Unknown:  {"unknown", "what an external program decides, of which nothing is known here"},
	Network:  {"network", "to answer at the node's address, for a moment"},
	Bearer:   {"bearer", "a text that works for whoever shows it: it can be copied, or a process on the node can have one made"},
	Key:      {"key", "the node's private key, which is in a file; what is shown with it is worth nothing a second time"},
	Hardware: {"hardware", "the node's hardware, or to break it open: its key cannot be copied"},
}

// String is the strength in one word, as it is on the wire.
func (s Strength) String() string { return strengths[s].name }

// Meaning says what one needs to pass for a node.
func (s Strength) Meaning() string { return strengths[s].meaning }
