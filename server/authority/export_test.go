package authority

func init() { workFactor = 10 }

// IDOf is what names an authority by its key's thumbprint.
var IDOf = idOf
