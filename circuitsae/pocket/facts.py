"""The fifty US states with their real capitals and four other real cities each, and which cities are held out.

A held-out city appears in one-hop sentences ("Tulsa is a city in the state of Oklahoma") and never in a two-hop one
("The capital of the state containing Tulsa is Oklahoma City"), so that two-hop answers for it have to be composed.
"""

import random
from dataclasses import dataclass

HELD_OUT_FRACTION = 0.2
_SPLIT_SEED = 1787
_NEVER_HELD_OUT = "Dallas"  # the city of the demonstration prompt

_TABLE = """
Alabama: Montgomery: Birmingham, Mobile, Huntsville, Tuscaloosa
Alaska: Juneau: Anchorage, Fairbanks, Sitka, Ketchikan
Arizona: Phoenix: Tucson, Mesa, Scottsdale, Flagstaff
Arkansas: Little Rock: Fort Smith, Jonesboro, Hot Springs, Bentonville
California: Sacramento: Los Angeles, San Diego, San Francisco, Fresno
Colorado: Denver: Boulder, Aurora, Pueblo, Durango
Connecticut: Hartford: New Haven, Bridgeport, Stamford, Waterbury
Delaware: Dover: Wilmington, Lewes, Smyrna, Seaford
Florida: Tallahassee: Miami, Orlando, Tampa, Jacksonville
Georgia: Atlanta: Savannah, Macon, Athens, Valdosta
Hawaii: Honolulu: Hilo, Kailua, Lahaina, Kapolei
Idaho: Boise: Nampa, Pocatello, Twin Falls, Rexburg
Illinois: Springfield: Chicago, Peoria, Rockford, Naperville
Indiana: Indianapolis: Fort Wayne, Evansville, South Bend, Gary
Iowa: Des Moines: Cedar Rapids, Davenport, Sioux City, Dubuque
Kansas: Topeka: Wichita, Olathe, Salina, Dodge City
Kentucky: Frankfort: Louisville, Lexington, Owensboro, Paducah
Louisiana: Baton Rouge: New Orleans, Shreveport, Lafayette, Lake Charles
Maine: Augusta: Bangor, Lewiston, Biddeford, Bar Harbor
Maryland: Annapolis: Baltimore, Frederick, Rockville, Bethesda
Massachusetts: Boston: Worcester, Cambridge, Lowell, Plymouth
Michigan: Lansing: Detroit, Grand Rapids, Ann Arbor, Flint
Minnesota: Saint Paul: Minneapolis, Duluth, Mankato, Saint Cloud
Mississippi: Jackson: Biloxi, Gulfport, Tupelo, Hattiesburg
Missouri: Jefferson City: Saint Louis, Branson, Joplin, Sedalia
Montana: Helena: Billings, Bozeman, Missoula, Butte
Nebraska: Lincoln: Omaha, Grand Island, Kearney, North Platte
Nevada: Carson City: Las Vegas, Reno, Henderson, Elko
New Hampshire: Concord: Nashua, Manchester, Keene, Laconia
New Jersey: Trenton: Newark, Jersey City, Atlantic City, Hoboken
New Mexico: Santa Fe: Albuquerque, Roswell, Las Cruces, Taos
New York: Albany: Buffalo, Rochester, Syracuse, Yonkers
North Carolina: Raleigh: Charlotte, Durham, Greensboro, Asheville
North Dakota: Bismarck: Fargo, Grand Forks, Minot, Williston
Ohio: Columbus: Cleveland, Cincinnati, Toledo, Akron
Oklahoma: Oklahoma City: Tulsa, Norman, Lawton, Stillwater
Oregon: Salem: Portland, Eugene, Bend, Medford
Pennsylvania: Harrisburg: Philadelphia, Pittsburgh, Scranton, Erie
Rhode Island: Providence: Newport, Warwick, Cranston, Pawtucket
South Carolina: Columbia: Greenville, Spartanburg, Myrtle Beach, Rock Hill
South Dakota: Pierre: Sioux Falls, Rapid City, Deadwood, Brookings
Tennessee: Nashville: Memphis, Knoxville, Chattanooga, Murfreesboro
Texas: Austin: Dallas, Houston, San Antonio, El Paso
Utah: Salt Lake City: Provo, Ogden, Moab, Logan
Vermont: Montpelier: Burlington, Rutland, Brattleboro, Stowe
Virginia: Richmond: Norfolk, Roanoke, Alexandria, Lynchburg
Washington: Olympia: Seattle, Spokane, Tacoma, Yakima
West Virginia: Charleston: Huntington, Morgantown, Wheeling, Parkersburg
Wisconsin: Madison: Milwaukee, Green Bay, Racine, Oshkosh
Wyoming: Cheyenne: Casper, Laramie, Cody, Gillette
"""


@dataclass(frozen=True, slots=True)
class State:
    """A state, its capital, and cities that are not its capital."""

    name: str
    capital: str
    cities: tuple[str, ...]


def _parse(table: str) -> tuple[State, ...]:
    rows = (line.split(": ") for line in table.strip().splitlines())
    return tuple(State(name, capital, tuple(cities.split(", "))) for name, capital, cities in rows)


def _choose_held_out(states: tuple[State, ...]) -> frozenset[str]:
    """At most one city a state, a fifth of all of them."""
    rng = random.Random(_SPLIT_SEED)
    count = round(HELD_OUT_FRACTION * sum(len(state.cities) for state in states))
    chosen = rng.sample(states, count)
    return frozenset(rng.choice([city for city in s.cities if city != _NEVER_HELD_OUT]) for s in chosen)


STATES = _parse(_TABLE)
STATE_OF = {city: state for state in STATES for city in state.cities}
CITIES = tuple(STATE_OF)
HELD_OUT_CITIES = _choose_held_out(STATES)
TRAINED_CITIES = tuple(city for city in CITIES if city not in HELD_OUT_CITIES)
CAPITALS = tuple(state.capital for state in STATES)
ENTITIES = (*(state.name for state in STATES), *CAPITALS, *CITIES)
